#include "export.h"

// Increase this number, and ABI in natten/backends/cpu/build.py, whenever plan.h or the exported functions change.
NATTEN_EXPORT int natten_abi() { return 3; }
