#define ARRONDI_PATH neon_i8mm
#include "lanes_neon.h"
#include "code_path.h"
