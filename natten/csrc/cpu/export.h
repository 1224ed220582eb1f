// The C interface that natten/backends/cpu calls. The functions of operators return 0, or 1 if they are out of memory, or 2
// if they fail for another reason.
#pragma once

#if defined(_WIN32)
#define NATTEN_EXPORT extern "C" __declspec(dllexport)
#else
#define NATTEN_EXPORT extern "C" __attribute__((visibility("default")))
#endif
