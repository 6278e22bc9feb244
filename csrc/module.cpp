// The Python module `batchnorm_ext._C`: importing it loads the schemas and the autograd rules; it tells how it was
// built, and by which words a refusal is known. It also calls the operators that a forward of a layer is made of: by
// way of torch.ops, where arguments become values of TorchScript, a call takes longer than a small kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "dtype.h"
#include "recompute.h"

namespace {

using at::Tensor;
using batchnorm_ext::kNone;
using batchnorm_ext::Normalized;
using batchnorm_ext::OptionalTensor;
using batchnorm_ext::Packed;

// The positional arguments of a call. What has another type is refused.
class Arguments {
 public:
  Arguments(PyObject* const* given, Py_ssize_t count, Py_ssize_t wanted) : values(given) {
    TORCH_CHECK_NOT_IMPLEMENTED(count == wanted, "expected ", wanted, " arguments, got ", count, ", ",
                                batchnorm_ext::kRefusal);
  }

  Tensor tensor(int i) const {
    TORCH_CHECK_NOT_IMPLEMENTED(THPVariable_Check(values[i]), "expected a tensor as argument ", i, ", ",
                                batchnorm_ext::kRefusal);
    return THPVariable_Unpack(values[i]);
  }

  OptionalTensor optional(int i) const { return values[i] == Py_None ? OptionalTensor() : tensor(i); }

  template <typename T>
  T value(int i) const try {
    return pybind11::handle(values[i]).cast<T>();
  } catch (const pybind11::cast_error& error) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "argument ", i, ": ", error.what(), ", ", batchnorm_ext::kRefusal);
  }

 private:
  PyObject* const* values;
};

// What call() gives, which does not touch Python.
template <typename Call>
PyObject* output_of(const Call& call) {
  Tensor output = [&] {
    const pybind11::gil_scoped_release others_run;
    return call();
  }();
  return THPVariable_Wrap(std::move(output));
}

PyObject* batch_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments a(values, count, 12);
  const Tensor x = a.tensor(0);
  const OptionalTensor weight = a.optional(1), bias = a.optional(2), mean = a.optional(3), var = a.optional(4);
  const OptionalTensor residual = a.optional(10);
  const auto activation = a.value<std::string>(11);
  const batchnorm_ext::Spec spec{a.value<bool>(5),
                                 a.value<double>(6),
                                 false,
                                 std::nullopt,
                                 {a.value<int64_t>(7), a.value<bool>(8), a.value<int64_t>(9)},
                                 activation};
  return output_of(
      [&] { return std::get<0>(call_forward({x, weight, bias, mean, var, kNone, kNone, residual}, spec)); });
  END_HANDLE_TH_ERRORS
}

PyObject* layer_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op =
      batchnorm_ext::find_operator<Normalized(const Tensor&, at::IntArrayRef, const OptionalTensor&,
                                              const OptionalTensor&, bool, double)>("batchnorm_ext::layer_norm");
  const Arguments a(values, count, 6);
  const Tensor x = a.tensor(0);
  const auto shape = a.value<std::vector<int64_t>>(1);
  const OptionalTensor weight = a.optional(2), bias = a.optional(3);
  const bool centred = a.value<bool>(4);
  const double eps = a.value<double>(5);
  return output_of([&] { return std::get<0>(op.call(x, shape, weight, bias, centred, eps)); });
  END_HANDLE_TH_ERRORS
}

PyObject* weight_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op =
      batchnorm_ext::find_operator<Tensor(const Tensor&, const Tensor&, int64_t)>("batchnorm_ext::weight_norm");
  const Arguments a(values, count, 3);
  const Tensor v = a.tensor(0), g = a.tensor(1);
  const auto dim = a.value<int64_t>(2);
  return output_of([&] { return op.call(v, g, dim); });
  END_HANDLE_TH_ERRORS
}

// The hooks of recompute_activations.
PyObject* pack(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  return pybind11::cast(std::make_unique<Packed>(THPVariable_Unpack(tensor))).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* unpack(PyObject*, PyObject* packed) {
  HANDLE_TH_ERRORS
  const auto& saved = pybind11::handle(packed).cast<const Packed&>();
  return output_of([&] { return saved.unpack(); });
  END_HANDLE_TH_ERRORS
}

PyObject* set_share(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments a(values, count, 2);
  const auto before = batchnorm_ext::set_share({a.value<double>(0), a.value<double>(1)});
  return Py_BuildValue("(dd)", before.share, before.due);
  END_HANDLE_TH_ERRORS
}

PyObject* is_recomputed(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(Packed(THPVariable_Unpack(tensor)).recipe() != nullptr);
  END_HANDLE_TH_ERRORS
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

template <Fast function>
PyMethodDef method(const char* name,
                   const char* doc = "the output of the operator of this name, all of whose arguments are given") {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method<batch_norm>("batch_norm"),
    method<layer_norm>("layer_norm"),
    method<weight_norm>("weight_norm"),
    {"pack", pack, METH_O, "what recompute_activations keeps of a tensor that autograd saves"},
    {"unpack", unpack, METH_O, "that tensor"},
    {"is_recomputed", is_recomputed, METH_O, "whether pack() keeps a way to compute this tensor instead of it"},
    method<set_share>("set_share", "the share of outputs to compute again, and bytes due; returns those before"),
    {}};

// The dtypes of torch that an input may have.
pybind11::frozenset dtypes() {
  pybind11::list list;
  for (int i = 0; i < static_cast<int>(at::ScalarType::NumOptions); ++i) {
    const auto dtype = static_cast<at::ScalarType>(i);
    if (batchnorm_ext::with_dtype(dtype, [](auto) {}))
      list.append(pybind11::handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype))));
  }
  return pybind11::frozenset(list);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of batchnorm_ext";
  m.attr("refusal") = batchnorm_ext::kRefusal;
  m.attr("dtypes") = dtypes();
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
  pybind11::class_<Packed>(m, "Packed");
  batchnorm_ext::set_pack_hook(pybind11::object(m.attr("pack")).ptr());
}
