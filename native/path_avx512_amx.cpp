#define ARRONDI_PATH avx512_amx
#include "lanes_avx512.h"
#include "matrix.h"
