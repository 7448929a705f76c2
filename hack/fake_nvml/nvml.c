/* A FAKE of NVIDIA's management library, for tests on machines without a GPU: the few functions that we call, with
 * NVML's names and structures, answering what a text file says. Never shipped in an image.
 *
 * FAKE_NVML_FILE names the file; a line a GPU: "<utilisation %> <bytes used> <bytes total>", where "-" is "not
 * supported". It is read at each question, so a test can change it. No file: no driver.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9 };
#define MOST 16

struct gpu { char utilisation[32], used[32], total[32]; };
struct utilisation { unsigned int gpu, memory; };
struct memory { unsigned long long total, free, used; };

static struct gpu gpus[MOST];

static int look(void) {
  const char *path = getenv("FAKE_NVML_FILE");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return -1;
  int count = 0;
  while (count < MOST &&
         fscanf(file, "%31s %31s %31s", gpus[count].utilisation, gpus[count].used, gpus[count].total) == 3)
    count++;
  fclose(file);
  return count;
}

/* A handle is the GPU's number plus one, since NULL is none. */
static struct gpu *find(void *handle) {
  long index = (long)handle - 1;
  return index >= 0 && index < look() ? &gpus[index] : NULL;
}

EXPORT int nvmlInitWithFlags(unsigned int flags) { (void)flags; return look() < 0 ? DRIVER_NOT_LOADED : SUCCESS; }
EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT int nvmlShutdown(void) { return SUCCESS; }

EXPORT int nvmlDeviceGetCount_v2(unsigned int *count) {
  int found = look();
  if (found < 0) return UNINITIALIZED;
  *count = (unsigned int)found;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
  if ((int)index >= look()) return INVALID_ARGUMENT;
  *handle = (void *)((long)index + 1);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetUtilizationRates(void *handle, struct utilisation *out) {
  struct gpu *gpu = find(handle);
  if (!gpu) return INVALID_ARGUMENT;
  if (!strcmp(gpu->utilisation, "-")) return NOT_SUPPORTED;
  out->gpu = (unsigned int)atoi(gpu->utilisation);
  out->memory = 0;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory *out) {
  struct gpu *gpu = find(handle);
  if (!gpu) return INVALID_ARGUMENT;
  if (!strcmp(gpu->used, "-")) return NOT_SUPPORTED;
  out->used = strtoull(gpu->used, NULL, 10);
  out->total = strtoull(gpu->total, NULL, 10);
  out->free = out->total - out->used;
  return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code) { (void)code; return "fake NVML"; }
