/* A FAKE of NVIDIA's management library, for tests on machines without a GPU: the few functions that we call, with
 * NVML's names and structures, answering what a text file says. Never shipped in an image.
 *
 * FAKE_NVML_FILE names the file; a line a GPU: "<utilisation %> <bytes used> <bytes total>", where "-" is "not
 * supported". It is read at each question, so a test can change it. No file: no driver.
 *
 * FAKE_NVML_FAULTS names a file of faults, one a line: "xid <GPU> <number>", reported once as an event, "ecc <GPU>
 * <errors>", and "lost <GPU> 1".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15 };
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

/* The value of the fault number `nth` of a kind, counting from 0; -1 if there are fewer. `gpu` is read if it is -1 and
 * must match otherwise. */
static long fault(const char *kind, int nth, int *gpu) {
  const char *path = getenv("FAKE_NVML_FAULTS");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return -1;
  char word[16];
  int index;
  long value, answer = -1;
  while (answer < 0 && fscanf(file, "%15s %d %ld", word, &index, &value) == 3)
    if (!strcmp(word, kind) && (*gpu < 0 || *gpu == index) && nth-- == 0) answer = value, *gpu = index;
  fclose(file);
  return answer;
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
  int index = (int)(long)handle - 1;
  if (!gpu) return INVALID_ARGUMENT;
  if (fault("lost", 0, &index) > 0) return GPU_IS_LOST;
  if (!strcmp(gpu->used, "-")) return NOT_SUPPORTED;
  out->used = strtoull(gpu->used, NULL, 10);
  out->total = strtoull(gpu->total, NULL, 10);
  out->free = out->total - out->used;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *out, unsigned int length) {
  if (!find(handle)) return INVALID_ARGUMENT;
  snprintf(out, length, "GPU-fake-%ld", (long)handle - 1);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetTotalEccErrors(void *handle, int kind, int counter, unsigned long long *out) {
  int index = (int)(long)handle - 1;
  long errors = fault("ecc", 0, &index);
  (void)kind, (void)counter;
  *out = errors > 0 ? (unsigned long long)errors : 0;
  return SUCCESS;
}

struct event { void *device; unsigned long long type, data; unsigned int gpu_instance, compute_instance; };

EXPORT int nvmlEventSetCreate(void **set) { static int one; *set = &one; return SUCCESS; }

EXPORT int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set) {
  (void)types, (void)set;
  return find(handle) ? SUCCESS : INVALID_ARGUMENT;
}

EXPORT int nvmlEventSetWait_v2(void *set, struct event *out, unsigned int timeout) {
  static int reported;
  int index = -1;
  long xid = fault("xid", reported, &index);
  (void)set, (void)timeout;
  if (xid < 0) return TIMEOUT;
  reported++;
  *out = (struct event){(void *)((long)index + 1), 8, (unsigned long long)xid, 0, 0};
  return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code) { (void)code; return "fake NVML"; }
