// The C interface, which natten/backends/cpu.py calls. Every function returns 0, or 1 if memory ran out.
#pragma once

#if defined(_WIN32)
#define NATTEN_EXPORT extern "C" __declspec(dllexport)
#else
#define NATTEN_EXPORT extern "C" __attribute__((visibility("default")))
#endif
