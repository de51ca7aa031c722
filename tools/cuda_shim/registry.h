// The kernels of a .cu file by name, called as cuLaunchKernel calls them: an array of pointers to the arguments.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace shim {
struct Kernel {
    std::string name;
    std::vector<size_t> sizes;  // of the arguments, in bytes
    void (*call)();
};
std::vector<Kernel> &kernels();
extern void **kernel_arguments;

template <auto kernel> struct Call;
template <class... T, void (*kernel)(T...)> struct Call<kernel> {
    template <size_t... i> static void with(std::index_sequence<i...>) {
        kernel(*static_cast<T *>(kernel_arguments[i])...);
    }
    SHIM_UNWATCHED static void call() { with(std::index_sequence_for<T...>()); }
    explicit Call(const char *name) { kernels().push_back({name, {sizeof(T)...}, call}); }
};
}  // namespace shim

#define SHIM_REGISTER(kernel) static shim::Call<kernel> registered_##kernel(#kernel);
