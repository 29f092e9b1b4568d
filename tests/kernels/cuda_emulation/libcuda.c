// A libcuda of two H100s that hold no memory and run nothing: what Triton's driver and launchers call, with CUDA's
// rules on contexts, streams and sizes. An observer sees every launch that CUDA would take.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

enum { GPUS = 2, STREAMS = 2, SHARED = 227 << 10, DEFAULT_SHARED = 48 << 10 };

struct CUctx_st {
  CUdevice device;
};
struct CUstream_st {
  CUcontext context;
};
struct CUmod_st {
  CUcontext context;
};
struct CUfunc_st {
  CUcontext context;
  unsigned most_shared;
  char name[];
};

typedef struct {
  CUfunction function;
  CUstream stream;
  CUdevice device;
  const char *name;
  unsigned grid[3], block[3], shared, attributes;
  void **parameters;
} Launch;

static struct CUctx_st contexts[GPUS] = {{0}, {1}};
static struct CUstream_st streams[GPUS][STREAMS];
static CUcontext current;
static void (*observer)(const Launch *);

void emulation_observe(void (*observe)(const Launch *)) { observer = observe; }

CUstream emulation_stream(CUdevice device, int number) {
  streams[device][number].context = &contexts[device];
  return &streams[device][number];
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_HANDLE    ? "of another context, or none"
          : error == CUDA_ERROR_INVALID_CONTEXT ? "no context is current"
                                                : "invalid argument";
  return CUDA_SUCCESS;
}

// --- devices and contexts ---------------------------------------------------------------------

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < GPUS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetCount(int *count) {
  *count = GPUS;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = 9;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = SHARED;
    break;
  default:
    *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  *device = current->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

// --- modules and functions ---------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  *module = malloc(sizeof(struct CUmod_st));
  (*module)->context = current;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

// Of a module, but never freed: no address is ever used for two functions.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = malloc(sizeof(struct CUfunc_st) + strlen(name) + 1);
  (*function)->context = module->context;
  (*function)->most_shared = DEFAULT_SHARED;
  strcpy((*function)->name, name);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  function->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// --- pointers, streams and launches -------------------------------------------------------------

// Host memory stands for a GPU's.
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (function->context != current || (config->hStream && config->hStream->context != current))
    return CUDA_ERROR_INVALID_HANDLE;
  if (config->gridDimX > 0x7fffffff || config->gridDimY > 65535 || config->gridDimZ > 65535 ||
      config->blockDimX * config->blockDimY * config->blockDimZ > 1024 ||
      config->sharedMemBytes > function->most_shared)
    return CUDA_ERROR_INVALID_VALUE;
  Launch launch = {
      .function = function,
      .stream = config->hStream,
      .device = current->device,
      .name = function->name,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared = config->sharedMemBytes,
      .attributes = config->numAttrs,
      .parameters = parameters,
  };
  if (observer)
    observer(&launch);
  return CUDA_SUCCESS;
}
