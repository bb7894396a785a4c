#define ARRONDI_PATH avx_vnni
#include "lanes_avx.h"
#include "code_path.h"
