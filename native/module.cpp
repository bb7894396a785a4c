// The Python module: numbers and addresses in, exceptions out. Shapes, types and layouts are checked by the Python side, which
// knows how to say them; what could still harm is checked here again.
#include "bind.h"

#include "kernels.h"

namespace arrondi {

NB_MODULE(_native, m) {
    // What is bound to a model lives as long as the process: its end is no leak.
    nb::set_leak_warnings(false);
    m.doc() = "Compiled kernels of arrondi; use it through arrondi.native.";
    m.def("path", [] { return path().name; }, "Name of the path in use.");
    m.def("use_path", [](const char* name) {
        if (const char* why = path_missing(name)) throw nb::value_error(why);
        use_path(name);
    });
    m.def("paths", [] {
        nb::list found;
        for (const char* const* name = path_names(); *name != nullptr; name++) {
            const char* why = path_missing(*name);
            found.append(nb::make_tuple(*name, why == nullptr ? nb::none() : nb::object(nb::str(why))));
        }
        return found;
    });
    m.def("traits", [] { return nb::make_tuple(path().fast_dot, path().bf16_dot, path().rows); });
    bind_products(m);
    bind_quantizers(m);
    bind_transforms(m);
    bind_tokens(m);
    bind_moments(m);
    bind_clips(m);
    bind_codes(m);
    bind_training(m);
    bind_trellis(m);
}

}  // namespace arrondi
