#include "export.h"

// To be raised, with natten/build.py's ABI, whenever plan.h or the exported functions change.
NATTEN_EXPORT int natten_abi() { return 1; }
