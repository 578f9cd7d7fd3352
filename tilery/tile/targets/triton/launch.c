/* Launches a Triton kernel of any signature through the CUDA driver.
 *
 * load(cubin, name, device, warps, shared, pdl, kinds) -> (kernel, registers, bytes of local memory per thread)
 * launch(kernel, grid, stream, *arguments) with one letter of `kinds` per argument: p address, i 32-bit, l 64-bit
 * integer, f 32-bit float.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>

#define MOST 128 /* arguments */

typedef struct {
  CUmodule module;
  CUfunction function;
  int device, warps, shared, pdl, count;
  char kinds[MOST];
} Kernel;

static CUresult (*ctx_get)(CUcontext *);
static CUresult (*ctx_set)(CUcontext);
static CUresult (*ctx_retain)(CUcontext *, CUdevice);
static CUresult (*module_load)(CUmodule *, const void *);
static CUresult (*module_function)(CUfunction *, CUmodule, const char *);
static CUresult (*function_set)(CUfunction, CUfunction_attribute, int);
static CUresult (*function_get)(int *, CUfunction_attribute, CUfunction);
static CUresult (*device_get)(int *, CUdevice_attribute, CUdevice);
static CUresult (*launch_ex)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*error_text)(CUresult, const char **);

static int connect(void) {
  if (launch_ex) return 1;
  void *lib = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  if (!lib) {
    PyErr_SetString(PyExc_RuntimeError, "libcuda.so.1 cannot be loaded: there is no NVIDIA driver");
    return 0;
  }
  ctx_get = dlsym(lib, "cuCtxGetCurrent");
  ctx_set = dlsym(lib, "cuCtxSetCurrent");
  ctx_retain = dlsym(lib, "cuDevicePrimaryCtxRetain");
  module_load = dlsym(lib, "cuModuleLoadData");
  module_function = dlsym(lib, "cuModuleGetFunction");
  function_set = dlsym(lib, "cuFuncSetAttribute");
  function_get = dlsym(lib, "cuFuncGetAttribute");
  device_get = dlsym(lib, "cuDeviceGetAttribute");
  error_text = dlsym(lib, "cuGetErrorString");
  launch_ex = dlsym(lib, "cuLaunchKernelEx");
  if (!launch_ex) PyErr_SetString(PyExc_RuntimeError, "the NVIDIA driver has no cuLaunchKernelEx; CUDA 12 has it");
  return launch_ex != NULL;
}

static int failed(CUresult code, const char *what) {
  if (code == CUDA_SUCCESS) return 0;
  const char *text = "unknown error";
  error_text(code, &text);
  PyErr_Format(PyExc_RuntimeError, "%s: CUDA error %d: %s", what, (int)code, text);
  return 1;
}

/* A thread that never used CUDA has no context. */
static int enter(int device) {
  CUcontext context = NULL;
  if (failed(ctx_get(&context), "cuCtxGetCurrent")) return 0;
  if (context) return 1;
  if (failed(ctx_retain(&context, device), "cuDevicePrimaryCtxRetain")) return 0;
  return !failed(ctx_set(context), "cuCtxSetCurrent");
}

static int prepare(Kernel *k, const char *cubin, const char *name, int *registers, int *local) {
  int most = 0, fixed = 0;
  if (failed(module_load(&k->module, cubin), "cuModuleLoadData")) return 0;
  if (failed(module_function(&k->function, k->module, name), "cuModuleGetFunction")) return 0;
  if (failed(device_get(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, k->device), "device")) return 0;
  if (failed(function_get(&fixed, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, k->function), "function")) return 0;
  if (k->shared + fixed > most) {
    PyErr_Format(PyExc_RuntimeError, "it needs %d bytes of shared memory, the device has %d; take smaller blocks or "
                 "fewer stages in the schedule", k->shared + fixed, most);
    return 0;
  }
  if (k->shared > 49152 &&
      failed(function_set(k->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, k->shared), "function"))
    return 0;
  function_get(registers, CU_FUNC_ATTRIBUTE_NUM_REGS, k->function);
  function_get(local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, k->function);
  return 1;
}

static void drop(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, "kernel")); }

static PyObject *load(PyObject *self, PyObject *args) {
  const char *cubin, *name, *kinds;
  Py_ssize_t size, count;
  int device, warps, shared, pdl, registers = 0, local = 0;
  if (!PyArg_ParseTuple(args, "y#siiiis#", &cubin, &size, &name, &device, &warps, &shared, &pdl, &kinds, &count))
    return NULL;
  if (count > MOST) {
    PyErr_Format(PyExc_ValueError, "a kernel takes at most %d arguments, this one has %zd", MOST, count);
    return NULL;
  }
  if (!connect() || !enter(device)) return NULL;
  Kernel *k = calloc(1, sizeof(Kernel));
  if (!k) return PyErr_NoMemory();
  k->device = device, k->warps = warps, k->shared = shared, k->pdl = pdl, k->count = (int)count;
  memcpy(k->kinds, kinds, count);
  if (!prepare(k, cubin, name, &registers, &local)) {
    free(k);
    return NULL;
  }
  PyObject *capsule = PyCapsule_New(k, "kernel", drop);
  return capsule ? Py_BuildValue("Nii", capsule, registers, local) : NULL;
}

static PyObject *launch(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  if (n < 3) {
    PyErr_SetString(PyExc_TypeError, "launch(kernel, grid, stream, *arguments)");
    return NULL;
  }
  Kernel *k = PyCapsule_GetPointer(args[0], "kernel");
  if (!k) return NULL;
  if (n - 3 != k->count) {
    PyErr_Format(PyExc_TypeError, "the kernel takes %d arguments, got %zd", k->count, n - 3);
    return NULL;
  }
  long long grid = PyLong_AsLongLong(args[1]);
  unsigned long long stream = PyLong_AsUnsignedLongLong(args[2]);
  union { uint64_t u; int64_t l; int32_t i; float f; } values[MOST + 2];
  void *params[MOST + 2];
  for (int a = 0; a < k->count; a++) {
    PyObject *item = args[a + 3];
    params[a] = &values[a];
    if (k->kinds[a] == 'p') {
      values[a].u = PyLong_AsUnsignedLongLong(item);
    } else if (k->kinds[a] == 'l') {
      values[a].l = PyLong_AsLongLong(item);
    } else if (k->kinds[a] == 'f') {
      values[a].f = (float)PyFloat_AsDouble(item);
    } else {
      long long number = PyLong_AsLongLong(item);
      if (number != (int32_t)number) {
        PyErr_Format(PyExc_OverflowError, "argument %d is %lld, which 32 bits do not hold", a, number);
        return NULL;
      }
      values[a].i = (int32_t)number;
    }
  }
  for (int a = k->count; a < k->count + 2; a++) { /* Triton's two scratch addresses, unused */
    values[a].u = 0;
    params[a] = &values[a];
  }
  if (PyErr_Occurred()) return NULL;
  if (grid > 0x7fffffffLL) {
    PyErr_Format(PyExc_OverflowError, "a grid of %lld programs, a device takes 2147483647; take larger blocks", grid);
    return NULL;
  }
  if (grid <= 0) Py_RETURN_NONE;
  if (!enter(k->device)) return NULL;
  CUlaunchAttribute overlap = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
  overlap.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {
    .gridDimX = (unsigned)grid, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 32u * k->warps, .blockDimY = 1,
    .blockDimZ = 1, .sharedMemBytes = (unsigned)k->shared, .hStream = (CUstream)stream, .attrs = &overlap,
    .numAttrs = k->pdl ? 1 : 0};
  CUresult code;
  Py_BEGIN_ALLOW_THREADS
  code = launch_ex(&config, k->function, params, NULL);
  Py_END_ALLOW_THREADS
  if (failed(code, "cuLaunchKernelEx")) return NULL;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
  {"load", load, METH_VARARGS, "Loads a binary."},
  {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launches a kernel."},
  {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tilery_launch", NULL, -1, methods};

PyMODINIT_FUNC PyInit_tilery_launch(void) { return PyModule_Create(&definition); }
