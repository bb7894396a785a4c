#define ARRONDI_PATH neon_dotprod
#include "lanes_neon.h"
#include "code_path.h"
