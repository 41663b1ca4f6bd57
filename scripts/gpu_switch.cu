// One CUDA graph of a whole bucketed network, in which the device itself picks each stage's bucket:
//
//   first -> [ count -> pick -> gather -> SWITCH { bucket 0 | bucket 1 | ... } ] for every stage
//
// The parts are graphs that the caller has captured, over buffers which all buckets of a stage share. Functions return
// 0 or a cudaError_t; `asvitSwitchError` names the call that failed.
#include <cstdint>
#include <cstdio>

#include <cuda_runtime.h>

namespace
{

char gError[200] = "";

bool failed(cudaError_t error, char const* what)
{
    if (error != cudaSuccess)
    {
        std::snprintf(gError, sizeof gError, "%s: %s", what, cudaGetErrorString(error));
    }
    return error != cudaSuccess;
}

// The smallest of the rising `buckets` that holds `size` rows.
__global__ void pick(cudaGraphConditionalHandle chosen, int64_t const* size, int32_t const* buckets, int count,
                     int64_t* stride)
{
    int bucket = 0;
    while (bucket < count - 1 && buckets[bucket] < *size)
    {
        ++bucket;
    }
    *stride = buckets[bucket];
    cudaGraphSetConditional(chosen, static_cast<unsigned>(bucket));
}

} // namespace

#define TRY(call)                                                                                                      \
    do                                                                                                                 \
    {                                                                                                                  \
        cudaError_t const error = (call);                                                                              \
        if (failed(error, #call))                                                                                      \
        {                                                                                                              \
            return static_cast<int32_t>(error);                                                                        \
        }                                                                                                              \
    } while (false)

extern "C"
{
    // `count` and `gather` hold a graph per stage, `bodies` one per stage and bucket. `size` (what counting leaves),
    // `buckets` and `stride` (what gathering reads) are device memory.
    int32_t asvitSwitchBuild(cudaGraph_t first, cudaGraph_t const* count, cudaGraph_t const* gather,
                             cudaGraph_t const* bodies, int32_t stages, int32_t bucketCount, int64_t const* size,
                             int32_t const* buckets, int64_t* stride, cudaGraphExec_t* made)
    {
        cudaGraph_t whole{};
        cudaGraphNode_t last{};
        TRY(cudaGraphCreate(&whole, 0));
        TRY(cudaGraphAddChildGraphNode(&last, whole, nullptr, 0, first));
        for (int32_t stage = 0; stage < stages; ++stage)
        {
            cudaGraphNode_t counted{};
            cudaGraphNode_t picked{};
            cudaGraphNode_t gathered{};
            TRY(cudaGraphAddChildGraphNode(&counted, whole, &last, 1, count[stage]));

            cudaGraphConditionalHandle chosen{};
            TRY(cudaGraphConditionalHandleCreate(&chosen, whole, 0, cudaGraphCondAssignDefault));
            void* arguments[] = {&chosen, &size, &buckets, &bucketCount, &stride};
            cudaGraphNodeParams kernel{};
            kernel.type = cudaGraphNodeTypeKernel;
            kernel.kernel.func = reinterpret_cast<void*>(pick);
            kernel.kernel.gridDim = dim3(1);
            kernel.kernel.blockDim = dim3(1);
            kernel.kernel.kernelParams = arguments;
            TRY(cudaGraphAddNode(&picked, whole, &counted, nullptr, 1, &kernel));
            TRY(cudaGraphAddChildGraphNode(&gathered, whole, &picked, 1, gather[stage]));

            cudaGraphNodeParams choice{};
            choice.type = cudaGraphNodeTypeConditional;
            choice.conditional.handle = chosen;
            choice.conditional.type = cudaGraphCondTypeSwitch;
            choice.conditional.size = static_cast<unsigned>(bucketCount);
            TRY(cudaGraphAddNode(&last, whole, &gathered, nullptr, 1, &choice));
            for (int32_t bucket = 0; bucket < bucketCount; ++bucket)
            {
                cudaGraphNode_t body{};
                TRY(cudaGraphAddChildGraphNode(&body, choice.conditional.phGraph_out[bucket], nullptr, 0,
                                               bodies[stage * bucketCount + bucket]));
            }
        }
        TRY(cudaGraphInstantiate(made, whole, 0));
        TRY(cudaGraphDestroy(whole));
        return 0;
    }

    int32_t asvitSwitchLaunch(cudaGraphExec_t graph, cudaStream_t stream)
    {
        TRY(cudaGraphLaunch(graph, stream));
        return 0;
    }

    int32_t asvitSwitchFree(cudaGraphExec_t graph)
    {
        TRY(cudaGraphExecDestroy(graph));
        return 0;
    }

    char const* asvitSwitchError() { return gError; }
}
