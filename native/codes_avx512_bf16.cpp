#define ARRONDI_PATH avx512_bf16
#include "lanes_avx512.h"
#include "code_path.h"
