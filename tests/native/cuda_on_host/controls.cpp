// What tests ask of the emulated runtime: counts, streams, capture and replay, as plain functions.
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT long launches() { return static_cast<long>(cuda_on_host::launches()); }
EXPORT long copies() { return static_cast<long>(cuda_on_host::copies()); }
EXPORT long live_allocations() { return static_cast<long>(cuda_on_host::live_allocations()); }

EXPORT int finish() { return cudaDeviceSynchronize(); }

EXPORT cudaStream_t make_stream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}

EXPORT int recording(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &status);
  return status != cudaStreamCaptureStatusNone;
}
EXPORT int begin_capture(cudaStream_t stream) {
  return cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
}
EXPORT cudaGraphExec_t end_capture(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  if (cudaStreamEndCapture(stream, &graph) != cudaSuccess) return nullptr;
  if (cudaGraphInstantiate(&exec, graph, 0) != cudaSuccess) exec = nullptr;
  cudaGraphDestroy(graph);
  return exec;
}
EXPORT int replay(cudaGraphExec_t exec, cudaStream_t stream) {
  const cudaError_t error = cudaGraphLaunch(exec, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}
