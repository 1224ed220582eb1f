// The C interface, which natten/backends/cpu calls. Every function returns 0, or 1 if memory ran
// out, or 2 if anything else failed.
#pragma once

#define NATTEN_EXPORT extern "C" __attribute__((visibility("default")))
