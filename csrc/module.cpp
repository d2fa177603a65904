// The Python module hyperfast._C: importing it loads this library, which registers the kernels
// (torch/). Its functions tell which build of them runs here, and how they run what.
#include <Python.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "network.h"
#include "plan.h"
#include "rows.h"
#include "torch/new_memory.h"

namespace hyperfast {
namespace {

// Any exception as a ValueError.
template <class F>
PyObject* guarded(const F& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

Dtype dtype_of(const std::string& name) {
  if (name == "float64") return Dtype::f64;
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::f16;
  fail("dtype must be float64, float32, bfloat16 or float16, got \"", name, "\"");
}

const char* name_of(Plan plan) {
  switch (plan) {
    case Plan::contract: return "contract";
    case Plan::tile: return "tile";
    case Plan::materialize: return "materialize";
  }
  return "";
}

PyObject* isa(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(kernels().isa); });
}

PyObject* isas(PyObject*, PyObject*) {
  return guarded([]() -> PyObject* {
    PyObject* names = PyList_New(0);
    for (const Kernels* build : builds()) {
      PyObject* name = names ? PyUnicode_FromString(build->isa) : nullptr;
      if (name && PyList_Append(names, name) == 0) {
        Py_DECREF(name);
        continue;
      }
      Py_XDECREF(name);
      Py_XDECREF(names);
      return nullptr;
    }
    return names;
  });
}

PyObject* plan(PyObject*, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"dtype",  "ragged",   "tasks",     "rows",
                                "params", "features", "gradients", nullptr};
  const char* dtype;
  int ragged, gradients;
  long long tasks, rows, params, features;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "spLLLLp", const_cast<char**>(names), &dtype,
                                   &ragged, &tasks, &rows, &params, &features, &gradients))
    return nullptr;
  return guarded([&] {
    const Groups groups = Grouping::assumed(ragged, tasks, rows, generated_piece);
    const Makes makes = gradients ? Makes::gradients : Makes::weights;
    return PyUnicode_FromString(name_of(default_plan(
        makes, dtype_of(dtype), groups, params, features, kernels().matrix_unit, kernels().pairs)));
  });
}

// The arguments of runs_whole and keeps.
struct Question {
  const char *network, *dtype;
  int ragged;
  long long tasks, rows, features;

  bool parse(PyObject* args, PyObject* keywords) {
    static const char* names[] = {"network", "dtype",    "ragged", "tasks",
                                  "rows",    "features", nullptr};
    return PyArg_ParseTupleAndKeywords(args, keywords, "sspLLL", const_cast<char**>(names),
                                       &network, &dtype, &ragged, &tasks, &rows, &features);
  }
};

PyObject* whole(PyObject*, PyObject* args, PyObject* keywords) {
  Question q;
  if (!q.parse(args, keywords)) return nullptr;
  return guarded([&] {
    const Network network(q.network);
    const Groups groups = Grouping::assumed(q.ragged, q.tasks, q.rows, generated_piece);
    return PyBool_FromLong(network.refusal().empty() &&
                           runs_whole(Makes::weights, dtype_of(q.dtype), groups, network.params(),
                                      kernels().matrix_unit, kernels().pairs));
  });
}

PyObject* kept(PyObject*, PyObject* args, PyObject* keywords) {
  Question q;
  if (!q.parse(args, keywords)) return nullptr;
  return guarded([&] {
    const Network network(q.network);
    return PyBool_FromLong(
        keeps(dtype_of(q.dtype), network.params(), network.kept(), q.tasks, q.rows, q.features));
  });
}

template <class F>
PyCFunction with_keywords(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyObject* poison_memory(PyObject*, PyObject* on) {
  const int truth = PyObject_IsTrue(on);
  if (truth < 0) return nullptr;
  poisons = truth;
  Py_RETURN_NONE;
}

PyObject* huge_pages(PyObject*, PyObject* args) {
  unsigned long long address, bytes;
  if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) return nullptr;
  ask_for_huge_pages(reinterpret_cast<void*>(std::uintptr_t(address)), bytes);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels run in this process."},
    {"isas", isas, METH_NOARGS, "The instruction sets that can run on this machine, best first."},
    {"plan", with_keywords(plan), METH_VARARGS | METH_KEYWORDS,
     "plan(dtype, ragged, tasks, rows, params, features, gradients): the plan of a layer that "
     "makes "
     "weights, or gradients of weights; `rows` are those of all tasks."},
    {"runs_whole", with_keywords(whole), METH_VARARGS | METH_KEYWORDS,
     "runs_whole(network, dtype, ragged, tasks, rows, features): whether hyper_mlp runs networks "
     "one after another, rather than layer by layer."},
    {"keeps", with_keywords(kept), METH_VARARGS | METH_KEYWORDS,
     "keeps(network, dtype, ragged, tasks, rows, features): whether a forward pass in training "
     "should keep its pre-activations."},
    {"ask_for_huge_pages", huge_pages, METH_VARARGS,
     "ask_for_huge_pages(address, bytes): for memory that nobody has touched yet."},
    {"poison_memory", poison_memory, METH_O,
     "poison_memory(on): for tests, whether results and scratch memory start as NaN."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace hyperfast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* module = PyModule_Create(&hyperfast::definition);
  if (module && PyModule_AddIntConstant(module, "NETWORKS_BYTES", hyperfast::networks_bytes) < 0)
    Py_CLEAR(module);
  return module;
}
