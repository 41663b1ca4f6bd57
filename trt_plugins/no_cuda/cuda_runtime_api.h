// Stands in for CUDA's header of this name. TensorRT's headers only pass these handles on, and so does the plugin, so
// that neither needs a CUDA toolkit: the kernel alone does.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
