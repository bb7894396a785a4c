#define ARRONDI_PATH neon_dotprod
#include "lanes_neon.h"
#include "path.h"
