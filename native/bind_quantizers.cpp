// Quantizers: what arrondi.quantizers hands over, as structs.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bind.h"
#include "kernels.h"
#include "quantizers.h"

namespace arrondi {
namespace {

using Facts = std::vector<int64_t>;      // rows, columns, group, qmin, qmax, fit, type of the scales, type of x
using Places = std::vector<uintptr_t>;   // x, scale, zero points, offsets

Type type_of(int64_t number) {
    if (number < 0 || number > 2) throw nb::value_error("there is no such type");
    return static_cast<Type>(number);
}

Groups groups_of(const Facts& f, float divisor, const Places& p) {
    if (f.size() != 8 || p.size() != 4) throw nb::value_error("groups have eight facts and four addresses");
    Groups g{};
    g.rows = f[0];
    g.columns = f[1];
    g.group = f[2];
    if (g.rows < 0 || g.columns < 1 || g.group < 1) throw nb::value_error("a size is not positive");
    g.groups = (g.columns + g.group - 1) / g.group;
    g.qmin = static_cast<int>(f[3]);
    g.qmax = static_cast<int>(f[4]);
    if (f[5] < 0 || f[5] > 4) throw nb::value_error("there is no such fit");
    g.fit = static_cast<Fit>(f[5]);
    g.divisor = divisor;
    g.scale_type = type_of(f[6]);
    g.x_type = type_of(f[7]);
    g.x = at<void>(p[0]);
    g.scale = at<float>(p[1]);
    g.zero = at<int32_t>(p[2]);
    g.offset = at<float>(p[3]);
    return g;
}

void check_bits(int bits) {
    if (bits < 1 || bits > 8) throw nb::value_error("codes have 1 to 8 bits");
}

}  // namespace

void bind_quantizers(nb::module_& m) {
    m.def("round_groups", [](const Facts& facts, float divisor, const Places& places, uintptr_t codes, int threads) {
        Rounding r{};
        r.on = groups_of(facts, divisor, places);
        r.codes = at<uint8_t>(codes);
        nb::gil_scoped_release free;
        return round_groups(r, threads);
    });
    m.def("round_packed", [](const Facts& facts, float divisor, const Places& places, uintptr_t packed, int64_t row_bytes,
                             int bits, int threads) {
        Rounding r{};
        r.on = groups_of(facts, divisor, places);
        check_bits(bits);
        if (row_bytes * 8 < r.on.columns * bits) throw nb::value_error("the packed rows are too short");
        r.packed = at<uint8_t>(packed);
        r.row_bytes = row_bytes;
        r.bits = bits;
        nb::gil_scoped_release free;
        return round_groups(r, threads);
    });
    m.def("pack_rows", [](uintptr_t codes, int64_t rows, int64_t columns, int bits, int lowest, uintptr_t packed,
                          int64_t row_bytes, int threads) {
        check_bits(bits);
        if (row_bytes * 8 < columns * bits) throw nb::value_error("the packed rows are too short");
        const Packing p{rows, columns, row_bytes, bits, lowest, at<uint8_t>(codes), at<uint8_t>(packed)};
        nb::gil_scoped_release free;
        pack_rows(p, threads);
    });
    m.def("restore", [](const Facts& facts, const Places& places, uintptr_t codes, bool is_signed, uintptr_t y, int y_type,
                        uintptr_t sums, int threads) {
        Restoring r{};
        r.on = groups_of(facts, 1.0f, places);
        if (type_of(y_type) == Type::f16) throw nb::value_error("float16 is restored by the twin");
        r.codes = at<uint8_t>(codes);
        r.is_signed = is_signed;
        r.y = at<void>(y);
        r.y_type = type_of(y_type);
        r.sums = at<double>(sums);
        nb::gil_scoped_release free;
        restore(r, threads);
    });
    m.def("search_grids", [](const Facts& facts, float divisor, const Places& places, uintptr_t importance, int twice_power,
                             bool mirrored, int threads) {
        if (twice_power != 4 && twice_power != 5 && twice_power != 8) throw nb::value_error("the power is 2, 2.5 or 4");
        const Search s{groups_of(facts, divisor, places), at<float>(importance), twice_power, mirrored};
        nb::gil_scoped_release free;
        return search_grids(s, threads);
    });
    m.def("split_groups", [](const Facts& facts, float divisor, const Places& places, float p, float beta, float kappa,
                             int iterations, bool normalize, int threads) {
        const Splitting s{groups_of(facts, divisor, places), p, beta, kappa, iterations, normalize};
        nb::gil_scoped_release free;
        return split_groups(s, threads);
    });
    m.def("search_superblocks", [](const Facts& f, const std::vector<float>& starts, const std::vector<double>& unit_steps,
                                   const std::vector<float>& table, const Places& p, const Facts& strides, int threads) {
        if (f.size() != 12 || p.size() != 6 || strides.size() != 4) throw nb::value_error("super-blocks have twelve facts, six addresses and four strides");
        Superblocks s{};
        s.groups = f[0];
        s.elements = static_cast<int>(f[1]);
        s.span = static_cast<int>(f[2]);
        if (s.groups < 1 || (s.elements != 16 && s.elements != 32) || s.span < 0 || s.span > kSuperLanes || (s.span > 0 && s.groups % s.span != 0))
            throw nb::value_error("there is no such super-block");
        s.qmin = static_cast<int>(f[3]);
        s.qmax = static_cast<int>(f[4]);
        s.offset = f[5] != 0;
        s.below = f[6] != 0;
        s.is_signed = f[7] != 0;
        s.inner_low = static_cast<int>(f[8]);
        s.inner_high = static_cast<int>(f[9]);
        s.zero_scales = f[10] != 0;
        s.unit_type = type_of(f[11]);
        s.starts = starts.data();
        s.start_count = static_cast<int>(starts.size());
        s.turns = 3;
        s.unit_steps = unit_steps.data();
        s.unit_count = static_cast<int>(unit_steps.size());
        s.first = static_cast<float>(s.qmin);
        if (!table.empty()) {
            if (table.size() < 3 || s.offset) throw nb::value_error("a table has its first value, cells for one, and cells, and no offset");
            s.first = table[0];
            s.cells_per_one = table[1];
            s.cells = table.data() + 2;
            s.cell_count = static_cast<int>(table.size()) - 2;
        }
        s.x = at<float>(p[0]);
        s.w = at<float>(p[1]);
        s.scale = at<float>(p[2]);
        s.shift = at<float>(p[3]);
        s.unit = at<float>(p[4]);
        s.shift_unit = at<float>(p[5]);
        s.x_element = strides[0];
        s.x_group = strides[1];
        s.w_element = strides[2];
        s.w_group = strides[3];
        nb::gil_scoped_release free;
        return search_superblocks(s, threads);
    });
    m.def("sweep", [](int64_t rows, int64_t first, int64_t last, int64_t stop, int qmin, int qmax, uintptr_t work,
                      uintptr_t owed, uintptr_t factor, int64_t ld, uintptr_t codes, uintptr_t places, uintptr_t groups,
                      uintptr_t scale, uintptr_t zero, uintptr_t offset, int threads) {
        if (rows < 0 || first < 0 || last < first || stop < last || ld < stop) throw nb::value_error("columns out of order");
        const Sweep s{rows, first, last, stop, qmin, qmax, at<float>(work), at<float>(owed), at<float>(factor), ld,
                      at<uint8_t>(codes), at<int64_t>(places), at<int64_t>(groups), at<float>(scale), at<float>(zero),
                      at<float>(offset)};
        nb::gil_scoped_release free;
        return sweep(s, threads);
    });
}

}  // namespace arrondi
