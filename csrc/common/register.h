// Registration of one kernel for one backend.
//
//   UNMASK_IMPL(CPU, commit, &commit)
//
// A stable-ABI kernel may take only double, int64_t, bool, Tensor and optionals or lists of these. A float or int parameter
// compiles and then receives garbage at run time, silently; OpSignature turns that into a compile error.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace unmask {

using torch::stable::Tensor;

template <class T>
struct IsBoxable : std::false_type {};
template <> struct IsBoxable<double> : std::true_type {};
template <> struct IsBoxable<int64_t> : std::true_type {};
template <> struct IsBoxable<bool> : std::true_type {};
template <> struct IsBoxable<Tensor> : std::true_type {};
template <> struct IsBoxable<void> : std::true_type {};
template <class T> struct IsBoxable<std::optional<T>> : IsBoxable<T> {};
template <class T> struct IsBoxable<std::vector<T>> : IsBoxable<T> {};
template <class... Ts> struct IsBoxable<std::tuple<Ts...>> : std::bool_constant<(IsBoxable<Ts>::value && ...)> {};

template <class F> struct OpSignature;
template <class R, class... A>
struct OpSignature<R (*)(A...)> {
  static constexpr bool kOk =
      IsBoxable<R>::value && (IsBoxable<std::remove_cv_t<std::remove_reference_t<A>>>::value && ...);
};

}  // namespace unmask

#define UNMASK_IMPL(KEY, NAME, FN)                                                                                     \
  static_assert(::unmask::OpSignature<decltype(FN)>::kOk,                                                              \
                #NAME ": only double, int64_t, bool, Tensor and optionals/lists/tuples of them cross the stable ABI"); \
  STABLE_TORCH_LIBRARY_IMPL(unmask, KEY, m) { m.impl(#NAME, TORCH_BOX(FN)); }
