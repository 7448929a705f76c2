/* A FAKE of NVIDIA's management library, for tests on machines without a GPU: the functions that we call, with NVML's
 * names, structures and return codes, answering what text files say. Never shipped in an image.
 *
 * FAKE_NVML_FILE names a file; a line a GPU: "<utilization %> <bytes used> <bytes total>", where "-" is "not
 * supported". No file: no driver.
 *
 * FAKE_NVML_FAULTS names a file of facts, one a line: "<fact> <GPU> <value>". Both are read at each question, so a test
 * can change them. Facts:
 *   xid             a number, reported once as an event, to a set in which the GPU is registered for Xid errors
 *   ecc, corrected  volatile ECC errors, uncorrected and corrected; "no-ecc" has none, as consumer cards
 *   lost            every question about the GPU is answered with GPU_IS_LOST
 *   fails           every question about the GPU is answered with this return code
 *   hangs           every question about the GPU waits for the given seconds
 *   mig             the number of MIG slices: then utilization isn't supported, and slices have handles of their own
 *   rows-corrected, rows-uncorrected, rows-pending, rows-failed    the row remapper; not supported without any of them
 *   power (mW), temperature (°C), clock (MHz), throttle (bits), pcie-tx, pcie-rx (KB/s), nvlink-tx, nvlink-rx (KiB)
 *                   not supported if there is no line
 *   mismatch        the library isn't that of the kernel's module (GPU -1)
 *
 * As NVML does, every function fails before nvmlInit, for a handle that it didn't return, and for a null pointer.
 * Compiled with -DOLD_DRIVER, the functions are missing that drivers before branch 535 lack.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum {
  SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
  DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, LIB_RM_VERSION_MISMATCH = 18
};
#define MOST 16
#define SLICES 7
#define NUMBER_OF_SLICE(handle) (((long)(handle) >> 8) - 1) /* -1 is the GPU itself */

struct gpu { char utilization[32], used[32], total[32]; };
struct utilization { unsigned int gpu, memory; };
struct memory { unsigned long long total, free, used; };
struct event { void *device; unsigned long long type, data; unsigned int gpu_instance, compute_instance; };
struct field {
  unsigned int id, scope;
  long long timestamp, latency;
  int type, result;
  union { double number; unsigned long long integer; } value;
};

static struct gpu gpus[MOST];
static int initialized;
static int registered[MOST];
static int set_of_events;

static int look(void) {
  const char *path = getenv("FAKE_NVML_FILE");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return -1;
  int count = 0;
  while (count < MOST &&
         fscanf(file, "%31s %31s %31s", gpus[count].utilization, gpus[count].used, gpus[count].total) == 3)
    count++;
  fclose(file);
  return count;
}

/* The value of fact number `nth` of a kind, counting from 0; -1 if there are fewer. `gpu` is set if it is -2 and must
 * match otherwise. */
static long long fact(const char *kind, int nth, int *gpu) {
  const char *path = getenv("FAKE_NVML_FAULTS");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return -1;
  char word[24];
  int index;
  long long value, answer = -1;
  while (answer < 0 && fscanf(file, "%23s %d %lld", word, &index, &value) == 3)
    if (!strcmp(word, kind) && (*gpu == -2 || *gpu == index) && nth-- == 0) answer = value, *gpu = index;
  fclose(file);
  return answer;
}

static long long of(int index, const char *kind) { return fact(kind, 0, &index); }

/* A handle is the GPU's number plus one, since NULL is none; a slice's number plus one is in the next byte. */
static int find(void *handle, int *index) {
  if (!initialized) return UNINITIALIZED;
  *index = (int)((long)handle & 0xff) - 1;
  if (*index < 0 || *index >= look()) return INVALID_ARGUMENT;
  if (NUMBER_OF_SLICE(handle) >= 0 && NUMBER_OF_SLICE(handle) >= of(*index, "mig")) return INVALID_ARGUMENT;
  long long seconds = of(*index, "hangs");
  if (seconds > 0) sleep((unsigned int)seconds);
  if (of(*index, "fails") > 0) return (int)of(*index, "fails");
  return of(*index, "lost") > 0 ? GPU_IS_LOST : SUCCESS;
}

#define FIND(handle, out)                             \
  int index;                                          \
  if (!(out)) return INVALID_ARGUMENT;                \
  int problem = find(handle, &index);                 \
  if (problem) return problem

/* What a slice has no part of is asked of its GPU. */
#define FIND_WHOLE(handle, out) FIND(handle, out); if (NUMBER_OF_SLICE(handle) >= 0) return NOT_SUPPORTED

static int figure(void *handle, const char *kind, unsigned int *out) {
  FIND_WHOLE(handle, out);
  long long value = of(index, kind);
  if (value < 0) return NOT_SUPPORTED;
  *out = (unsigned int)value;
  return SUCCESS;
}

EXPORT int nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  if (look() < 0) return DRIVER_NOT_LOADED;
  if (of(-1, "mismatch") > 0) return LIB_RM_VERSION_MISMATCH;
  initialized = 1;
  return SUCCESS;
}
EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT int nvmlShutdown(void) { return initialized ? (initialized = 0, SUCCESS) : UNINITIALIZED; }

EXPORT int nvmlDeviceGetCount_v2(unsigned int *count) {
  if (!initialized) return UNINITIALIZED;
  if (!count) return INVALID_ARGUMENT;
  *count = (unsigned int)look();
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
  if (!initialized) return UNINITIALIZED;
  if (!handle || (int)index >= look()) return INVALID_ARGUMENT;
  if (of((int)index, "lost") > 0) return GPU_IS_LOST;
  *handle = (void *)((long)index + 1);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
  FIND_WHOLE(handle, current);
  if (of(index, "mig") < 0) return NOT_SUPPORTED;
  *current = *pending = of(index, "mig") > 0;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned int *count) {
  FIND_WHOLE(handle, count);
  *count = of(index, "mig") < 0 ? 0 : SLICES;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned int slice, void **out) {
  FIND_WHOLE(handle, out);
  if (of(index, "mig") <= 0) return NOT_SUPPORTED;
  if (slice >= SLICES) return INVALID_ARGUMENT;
  if (slice >= of(index, "mig")) return NOT_FOUND;
  *out = (void *)((long)handle | ((long)slice + 1) << 8);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *out) {
  FIND(handle, out);
  if (of(index, "mig") > 0 || !strcmp(gpus[index].utilization, "-")) return NOT_SUPPORTED;
  out->gpu = (unsigned int)atoi(gpus[index].utilization);
  out->memory = 0;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory *out) {
  FIND(handle, out);
  if (!strcmp(gpus[index].used, "-")) return NOT_SUPPORTED;
  unsigned long long share = NUMBER_OF_SLICE(handle) < 0 ? 1 : SLICES;
  out->used = strtoull(gpus[index].used, NULL, 10) / share;
  out->total = strtoull(gpus[index].total, NULL, 10) / share;
  out->free = out->total - out->used;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *out, unsigned int length) {
  FIND(handle, out);
  if (length < 41) return INSUFFICIENT_SIZE; /* NVML_DEVICE_UUID_BUFFER_SIZE is 80, V1 "GPU-" and 36 characters */
  if (NUMBER_OF_SLICE(handle) >= 0) snprintf(out, length, "MIG-fake-%d-%ld", index, NUMBER_OF_SLICE(handle));
  else snprintf(out, length, "GPU-fake-%d", index);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetTotalEccErrors(void *handle, int kind, int counter, unsigned long long *out) {
  FIND_WHOLE(handle, out);
  if (kind < 0 || kind > 1 || counter < 0 || counter > 1) return INVALID_ARGUMENT;
  if (of(index, "no-ecc") > 0) return NOT_SUPPORTED;
  long long errors = of(index, kind ? "ecc" : "corrected");
  *out = errors > 0 ? (unsigned long long)errors : 0;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetRemappedRows(void *handle, unsigned int *corrected, unsigned int *uncorrected,
                                     unsigned int *pending, unsigned int *failed) {
  FIND_WHOLE(handle, corrected);
  const char *kinds[] = {"rows-corrected", "rows-uncorrected", "rows-pending", "rows-failed"};
  unsigned int *outs[] = {corrected, uncorrected, pending, failed};
  int supported = 0;
  for (int kind = 0; kind < 4; kind++) {
    long long rows = of(index, kinds[kind]);
    supported |= rows >= 0;
    *outs[kind] = rows > 0 ? (unsigned int)rows : 0;
  }
  return supported ? SUCCESS : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned int *out) { return figure(handle, "power", out); }

EXPORT int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned int *out) {
  return sensor ? INVALID_ARGUMENT : figure(handle, "temperature", out);
}

EXPORT int nvmlDeviceGetClockInfo(void *handle, int clock, unsigned int *out) {
  return clock == 1 ? figure(handle, "clock", out) : INVALID_ARGUMENT; /* 1 is the SM's */
}

EXPORT int nvmlDeviceGetPcieThroughput(void *handle, int counter, unsigned int *out) {
  return counter < 0 || counter > 1 ? INVALID_ARGUMENT : figure(handle, counter ? "pcie-rx" : "pcie-tx", out);
}

static int throttle(void *handle, unsigned long long *out) {
  unsigned int bits = 0;
  int result = out ? figure(handle, "throttle", &bits) : INVALID_ARGUMENT;
  if (!result) *out = bits;
  return result;
}
EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *out) {
  return throttle(handle, out);
}
#ifndef OLD_DRIVER
EXPORT int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *out) {
  return throttle(handle, out);
}
#endif

/* The call succeeds although a field isn't supported: each has a result of its own. */
EXPORT int nvmlDeviceGetFieldValues(void *handle, int count, struct field *fields) {
  FIND(handle, fields);
  for (int i = 0; i < count; i++) {
    const char *kind = fields[i].id == 138 ? "nvlink-tx" : fields[i].id == 139 ? "nvlink-rx" : NULL;
    int all_links = fields[i].scope == 0xffffffff;
    long long value = kind && all_links && NUMBER_OF_SLICE(handle) < 0 ? of(index, kind) : -1;
    fields[i].result = value < 0 ? NOT_SUPPORTED : SUCCESS;
    fields[i].type = 3; /* unsigned long long */
    fields[i].value.integer = value < 0 ? 0 : (unsigned long long)value;
  }
  return SUCCESS;
}

EXPORT int nvmlEventSetCreate(void **set) {
  if (!initialized) return UNINITIALIZED;
  if (!set) return INVALID_ARGUMENT;
  *set = &set_of_events;
  return SUCCESS;
}

EXPORT int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set) {
  FIND_WHOLE(handle, set);
  if (set != &set_of_events) return INVALID_ARGUMENT;
  registered[index] = (types & 8) != 0;
  return SUCCESS;
}

EXPORT int nvmlEventSetWait_v2(void *set, struct event *out, unsigned int timeout) {
  static int next;
  (void)timeout;
  if (!initialized) return UNINITIALIZED;
  if (set != &set_of_events || !out) return INVALID_ARGUMENT;
  int count = look();
  for (;;) {
    int index = -2;
    long long xid = fact("xid", next, &index);
    if (xid < 0) break;
    next++;
    if (index < 0 || index >= count || !registered[index]) continue;
    *out = (struct event){(void *)((long)index + 1), 8, (unsigned long long)xid, 0xffffffff, 0xffffffff};
    return SUCCESS;
  }
  for (int index = 0; index < count; index++)
    if (registered[index] && of(index, "lost") > 0) return GPU_IS_LOST;
  return TIMEOUT;
}

EXPORT const char *nvmlErrorString(int code) { (void)code; return "fake NVML"; }
