// The table of one path for codes: included last by codes_*.cpp, which are compiled like path_*.cpp.
#pragma once

#include "code_values.h"

namespace arrondi {
namespace ARRONDI_PATH {

extern const Codes kCodes;
const Codes kCodes = {convolve, depthwise, pair, largest, mean, average, round_codes};

}  // namespace ARRONDI_PATH
}  // namespace arrondi
