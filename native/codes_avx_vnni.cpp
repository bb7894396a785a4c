#define ARRONDI_PATH avx_vnni
#include "lanes_avx2.h"
#include "code_path.h"
