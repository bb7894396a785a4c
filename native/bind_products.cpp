// Products and the packing of their weights.
#include <nanobind/stl/vector.h>

#include <cstring>
#include <vector>

#include "bind.h"
#include "kernels.h"
#include "prepack.h"
#include "trellis.h"

namespace arrondi {
namespace {

using Facts = std::vector<int64_t>;  // the fields of native_linear.Facts or Rounding, in their order

int log2_of(int64_t run) {
    int shift = 0;
    while (int64_t{1} << shift < run && shift < 30) shift++;
    if (int64_t{1} << shift != run) throw nb::value_error("sides are turned in blocks of a power of two");
    return shift;
}

Weight weight_of(const Facts& f, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t offset, uintptr_t table,
                 uintptr_t unit, uintptr_t offset_unit, uintptr_t rows, uintptr_t columns) {
    if (f.size() != 17) throw nb::value_error("a packed weight has seventeen facts");
    Weight w{};
    if (f[0] < 0 || f[0] > static_cast<int>(Kind::ring)) throw nb::value_error("there is no such kind of packed weight");
    w.kind = static_cast<Kind>(f[0]);
    w.n = static_cast<int>(f[1]);
    w.k = static_cast<int>(f[2]);
    w.group = static_cast<int>(f[3]);
    w.groups = static_cast<int>(f[4]);
    w.scale_type = static_cast<Type>(f[5]);
    w.zero_all = static_cast<int>(f[6]);
    w.offset_type = static_cast<Type>(f[8]);
    w.counted = static_cast<Counted>(f[9]);
    w.run = static_cast<int>(f[10]);
    if (w.run < 1) throw nb::value_error("a unit is for at least one group");
    w.runs = (w.groups + w.run - 1) / w.run;
    w.steps = steps_of(w.kind, w.k);
    if (w.n < 0 || w.k < 1 || w.group < 1 || w.groups < 1) throw nb::value_error("a size of the packed weight is not positive");
    int64_t bytes;
    if (w.kind == Kind::ring) {
        for (int i = 0; i < 2; i++) {
            if (f[11 + i] < 1 || f[11 + i] > 4) throw nb::value_error("codes of a ring that is multiplied have 1 to 4 bits");
            w.ring_bits[i] = static_cast<int>(f[11 + i]);
        }
        w.state_bits = static_cast<int>(f[13]);
        if (w.state_bits < 8 || w.state_bits > 16) throw nb::value_error("states have 8 to 16 bits");
        w.squares = f[16] != 0;
        if (w.squares && (w.n % kBlock != 0 || w.k % kBlock != 0)) throw nb::value_error("squares have sixteen rows and sixteen columns");
        bytes = ring_bytes(w.n, w.k, w.ring_bits[0], w.ring_bits[1], w.squares);
    } else {
        bytes = packed_bytes(w.kind, w.n, w.k);
    }
    w.turn = {at<float>(columns), at<float>(rows), log2_of(f[15]), log2_of(f[14])};
    if (f[7] < bytes) throw nb::value_error("the packed codes are shorter than their shape asks for");
    w.codes = at<uint8_t>(codes);
    w.scale = at<void>(scale);
    w.zero = at<uint8_t>(zero);
    w.offset = at<void>(offset);
    w.unit = at<void>(unit);
    w.offset_unit = at<void>(offset_unit);
    w.tables = at<uint8_t>(table);
    if (table != 0 && one_table(w.kind)) std::memcpy(w.bytes, at<uint8_t>(table), 16);
    if (table != 0 && w.kind == Kind::float4) std::memcpy(w.floats, at<float>(table), 64);
    return w;
}

}  // namespace

void bind_products(nb::module_& m) {
    m.def("packed_bytes", [](int kind, int n, int k) { return packed_bytes(static_cast<Kind>(kind), n, k); });
    m.def("prepack", [](int kind, uintptr_t rows, int64_t row_bytes, int bits, int add, int n, int k, uintptr_t out, int threads) {
        nb::gil_scoped_release free;
        prepack(static_cast<Kind>(kind), at<uint8_t>(rows), row_bytes, bits, add, n, k, at<uint8_t>(out), threads);
    });
    m.def("unpack_stream", [](uintptr_t rows, int64_t row_bytes, int bits, int add, int64_t n, int k, uintptr_t out, int threads) {
        nb::gil_scoped_release free;
        unpack_stream(at<uint8_t>(rows), row_bytes, bits, add, n, k, at<uint8_t>(out), threads);
    });
    m.def("unpack_rows", [](int kind, uintptr_t packed, int k, int first, int count, uintptr_t out) {
        nb::gil_scoped_release free;
        unpack_rows(static_cast<Kind>(kind), at<uint8_t>(packed), k, first, count, at<uint8_t>(out));
    });
    m.def("ring_rows", [](const Facts& facts, uintptr_t codes, uintptr_t scale, int64_t count, uintptr_t ids, uintptr_t y, int threads) {
        run(ring_rows, RingRows{weight_of(facts, codes, scale, 0, 0, 0, 0, 0, 0, 0), count, at<int64_t>(ids), at<float>(y), threads});
    });
    // A product with its weight bound: what stays the same from call to call crosses from Python once.
    nb::class_<Product>(m, "Product")
        .def("__init__", [](Product* made, const Facts& facts, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t offset,
                            uintptr_t table, uintptr_t unit, uintptr_t offset_unit, uintptr_t rows, uintptr_t columns, int digits,
                            const Facts& rounding, uintptr_t x_scale, uintptr_t x_zero, uintptr_t bias, uintptr_t norm, float eps, int gate) {
            Product p{};
            p.weight = weight_of(facts, codes, scale, zero, offset, table, unit, offset_unit, rows, columns);
            p.digits = digits;
            p.rounded = !rounding.empty();
            if (p.rounded) {
                if (rounding.size() != 4) throw nb::value_error("the rounding of activations has four facts");
                p.lowest = static_cast<int>(rounding[0]);
                p.highest = static_cast<int>(rounding[1]);
                p.step_type = static_cast<Type>(rounding[2]);
                p.x_group = static_cast<int>(rounding[3]);
            }
            p.x_scale = at<float>(x_scale);
            p.x_zero = at<int32_t>(x_zero);
            p.bias = at<float>(bias);
            p.norm = at<float>(norm);
            p.eps = eps;
            p.gate = static_cast<Gate>(gate);
            new (made) Product(p);
        })
        .def("__call__", [](const Product& bound, uintptr_t x, int x_type, int64_t ldx, int rows, uintptr_t y, int y_type,
                            int64_t ldy, uintptr_t residual, int64_t ldr, bool integers, int threads) {
            Product p = bound;
            p.x = at<void>(x);
            p.x_type = static_cast<Type>(x_type);
            p.ldx = ldx;
            p.m = rows;
            p.y = at<void>(y);
            p.y_type = static_cast<Type>(y_type);
            p.ldy = ldy;
            p.residual = at<void>(residual);
            p.ldr = ldr;
            p.integers = integers;
            p.threads = threads;
            const char* wrong;
            {
                nb::gil_scoped_release free;
                wrong = product(p);
            }
            if (wrong != nullptr) throw nb::value_error(wrong);
        });
}

}  // namespace arrondi
