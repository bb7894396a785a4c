#define ARRONDI_PATH portable
#include "lanes_portable.h"
#include "code_path.h"
