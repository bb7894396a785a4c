// Shared by the files that make up the Python module.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace nb = nanobind;

namespace arrondi {

// An address that Python took from a tensor, and that Python keeps alive during the call.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Runs a checked job without Python's lock; what is wrong with it becomes a ValueError.
template <class Job>
void run(const char* (*function)(const Job&), const Job& job) {
    const char* wrong;
    {
        nb::gil_scoped_release free;
        wrong = function(job);
    }
    if (wrong != nullptr) throw nb::value_error(wrong);
}

void bind_products(nb::module_& m);
void bind_quantizers(nb::module_& m);
void bind_transforms(nb::module_& m);
void bind_tokens(nb::module_& m);
void bind_moments(nb::module_& m);
void bind_clips(nb::module_& m);
void bind_codes(nb::module_& m);
void bind_training(nb::module_& m);
void bind_trellis(nb::module_& m);

}  // namespace arrondi
