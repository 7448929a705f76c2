/* A FAKE of NVIDIA's driver library, for tests on machines without a GPU: just enough for the CUDA runtime to ask how
 * old the driver is, before anything else. Never shipped in an image.
 *
 * FAKE_CUDA_VERSION is the newest CUDA that the driver supports, as CUDA counts it: 12040 is 12.4. FAKE_CUDA_INIT is
 * what cuInit returns, such as 802 (system not yet initialized).
 */
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { SUCCESS = 0, NOT_FOUND = 500 };

EXPORT int cuInit(unsigned int flags) {
  const char *code = getenv("FAKE_CUDA_INIT");
  (void)flags;
  return code ? atoi(code) : SUCCESS;
}

EXPORT int cuDriverGetVersion(int *version) {
  const char *text = getenv("FAKE_CUDA_VERSION");
  *version = text ? atoi(text) : 12040;
  return SUCCESS;
}

EXPORT int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }

EXPORT int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags);

EXPORT int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, void *status) {
  (void)flags, (void)status;
  *function = NULL;
  if (!strcmp(symbol, "cuInit")) *function = (void *)cuInit;
  if (!strcmp(symbol, "cuDriverGetVersion")) *function = (void *)cuDriverGetVersion;
  if (!strcmp(symbol, "cuDeviceGetCount")) *function = (void *)cuDeviceGetCount;
  if (!strcmp(symbol, "cuGetProcAddress"))
    *function = version < 12000 ? (void *)cuGetProcAddress : (void *)cuGetProcAddress_v2;
  return *function ? SUCCESS : NOT_FOUND;
}

int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
