// The table of one path: included last by path_*.cpp.
#pragma once

#include "along.h"
#include "cached.h"
#include "gptq.h"
#include "hadamard.h"
#include "hqq.h"
#include "product.h"
#include "quantize.h"
#include "search.h"
#include "sides.h"
#include "signs.h"
#include "superblocks.h"
#include "token.h"
#include "viterbi.h"

#define ARRONDI_NAME_(path) #path
#define ARRONDI_NAME(path) ARRONDI_NAME_(path)

namespace arrondi {
namespace ARRONDI_PATH {

const Transforms kTransforms = {butterflies, base_product, pack_signs, multiply_signs, read};
const Tokens kTokens = {dense, attend, rotate, attend_packed, attend_along};
const Training kTraining = {largest_of_rows, largest_of_columns, round_codes, scale_sums};
extern const Codes kCodes;  // codes_*.cpp
extern const Path kPath;
const Path kPath = {ARRONDI_NAME(ARRONDI_PATH), kRows, kVectors, kFastDot, kHasBf16Dot, kWords, pack_tile, stream, panel,
                    panel_scratch, nullptr, finish_token, ring_row, {round, pack, restore, search, split, superblocks, sweep, search_ring}, &kTransforms, &kTokens,
                    &kCodes, &kTraining};

}  // namespace ARRONDI_PATH
}  // namespace arrondi
