// The C interface that natten/backends/cpu calls. Each function returns 0, or 1 if it is out of memory, or 2 if it fails
// for another reason.
#pragma once

#define NATTEN_EXPORT extern "C" __attribute__((visibility("default")))
