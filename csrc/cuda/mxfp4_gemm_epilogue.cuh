// What mxfp4_gemm does to an accumulator before it is stored:
// out = round(accumulator + bias).
//
// The dtypes of bias and out are run-time arguments: a CUTLASS kernel compiles for over a minute,
// and a template argument for each dtype would multiply that by six. Out is stored as 16-bit words.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <type_traits>

#include "problem.h"

namespace duqpp::cuda {

namespace fusion = cutlass::epilogue::fusion;

// Rounds float32 to the words of bfloat16 or float16.
struct RoundArguments {
  bool to_float16;
};

template <class T>
struct Round {
  using Arguments = RoundArguments;

  template <int kSize>
  CUTLASS_DEVICE cutlass::Array<uint16_t, kSize> operator()(
      const cutlass::Array<float, kSize>& values, const RoundArguments& arguments) const {
    return arguments.to_float16 ? words<cutlass::half_t>(values)
                                : words<cutlass::bfloat16_t>(values);
  }

 private:
  template <class Element, int kSize>
  CUTLASS_DEVICE static cutlass::Array<uint16_t, kSize> words(
      const cutlass::Array<float, kSize>& values) {
    const auto rounded = cutlass::NumericArrayConverter<Element, float, kSize>{}(values);
    return reinterpret_cast<const cutlass::Array<uint16_t, kSize>&>(rounded);
  }
};

// The bias belongs to the columns of D or, in a swapped kernel, to its rows.
enum class BiasAlong { kColumns, kRows };

template <class CtaTile, BiasAlong along>
using BiasBroadcast =
    std::conditional_t<along == BiasAlong::kColumns, fusion::Sm90RowBroadcast<0, CtaTile, float>,
                       fusion::Sm90ColBroadcast<0, CtaTile, float>>;

// CUTLASS's broadcast of a float32 vector, reading a vector of any dtype instead. The base class
// addresses the bias as if it were float32; only the index is taken from its addresses.
template <class CtaTile, BiasAlong along>
struct Bias : BiasBroadcast<CtaTile, along> {
  using Broadcast = BiasBroadcast<CtaTile, along>;

  struct Arguments {
    const void* bias;  // or null
    Dtype dtype;
  };
  struct Params {
    typename Broadcast::Params broadcast;
    const void* bias;
    Dtype dtype;
  };
  using SharedStorage = typename Broadcast::SharedStorage;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape& shape,
                                                  const Arguments& arguments, void* workspace) {
    const typename Broadcast::Arguments base{static_cast<const float*>(arguments.bias), 0.0f, {}};
    return {Broadcast::to_underlying_arguments(shape, base, workspace), arguments.bias,
            arguments.dtype};
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }

  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Bias() {}
  CUTLASS_HOST_DEVICE Bias(const Params& params, const SharedStorage& storage)
      : Broadcast(params.broadcast, storage), bias(params.bias), dtype(params.dtype) {}

  const void* bias = nullptr;
  Dtype dtype = Dtype::kFloat32;

  // The base class's callbacks, with the loads from global memory replaced.
  template <class Base>
  struct Callbacks : Base {
    const void* bias;
    Dtype dtype;

    CUTLASS_DEVICE Callbacks(const Base& base, const void* bias, Dtype dtype)
        : Base(base), bias(bias), dtype(dtype) {}

    CUTLASS_DEVICE void begin() {
      using namespace cute;
      // The bias may come from the kernel before this one, like everything else that is read.
      if (bias != nullptr) cutlass::arch::wait_on_dependent_grids();
      if constexpr (along == BiasAlong::kColumns) {
        Tensor source = filter_zeros(this->tGS_gRow);
        Tensor target = filter_zeros(this->tGS_sRow);
        Tensor coordinate = filter_zeros(this->tGS_cRow, this->tGS_gRow.stride());
        // More threads than columns: some have nothing to load.
        for (int i = 0; i < size(source); ++i) {
          if (get<1>(coordinate(i)) >= cute::size<1>(CtaTile{})) continue;
          const bool inside = bias != nullptr && elem_less(coordinate(i), this->residue_cRow);
          target(i) = inside ? load(raw_pointer_cast(&source(i)) - this->params.ptr_row) : 0.0f;
        }
      } else {
        if (bias == nullptr) return;  // the constructor has filled zeros
        Tensor source = filter_zeros(this->tCgCol);
        Tensor target = filter_zeros(this->tCrCol);
        Tensor coordinate = filter_zeros(this->tCcCol, this->tCgCol.stride());
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(target); ++i) {
          const bool inside = elem_less(coordinate(i), this->residue_tCcCol);
          target(i) = inside ? load(raw_pointer_cast(&source(i)) - this->params.ptr_col) : 0.0f;
        }
      }
    }

    CUTLASS_DEVICE float load(int64_t index) const {
      if (dtype == Dtype::kFloat32) return static_cast<const float*>(bias)[index];
      if (dtype == Dtype::kFloat16) return static_cast<const cutlass::half_t*>(bias)[index];
      return static_cast<const cutlass::bfloat16_t*>(bias)[index];
    }
  };

  // A row stays in shared memory until it is used: in registers, as the base class keeps it, it
  // would stand beside the accumulators and spill them.
  template <class Base>
  struct RowCallbacks : Callbacks<Base> {
    using Callbacks<Base>::Callbacks;

    CUTLASS_DEVICE void begin_loop(int, int) {}

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(const cutlass::Array<Accumulator, kSize>&,
                                                      int fragment, int epi_m, int epi_n) {
      using cute::_;
      cute::Tensor row = this->tSR_sRow(_, _, _, epi_m, epi_n);
      cutlass::Array<float, kSize> values;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) values[i] = row(fragment * kSize + i);
      return values;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto base = Broadcast::template get_consumer_store_callbacks<kReferenceSource>(args);
    if constexpr (along == BiasAlong::kColumns) {
      return RowCallbacks<decltype(base)>(base, bias, dtype);
    } else {
      return Callbacks<decltype(base)>(base, bias, dtype);
    }
  }
};

}  // namespace duqpp::cuda
