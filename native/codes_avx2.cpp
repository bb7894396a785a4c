#define ARRONDI_PATH avx2
#include "lanes_avx2.h"
#include "code_path.h"
