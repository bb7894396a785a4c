#define ARRONDI_PATH avx512_vnni
#include "lanes_avx512.h"
#include "code_path.h"
