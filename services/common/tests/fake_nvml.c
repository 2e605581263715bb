/* A stand-in for NVIDIA's libnvidia-ml.so.1, where no driver is: card 0 is whole, card 1 is divided by MIG and has instances in its places 0
   and 2, of which utilization and power are not told, as with real ones, and card 2 has fallen off the bus. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define OK 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define LOST 15

enum { WHOLE = 1, DIVIDED = 2, INSTANCE = 10 };

struct memory { unsigned long long total, free, used; };
struct utilization { unsigned int gpu, memory; };

static int is_instance(uintptr_t gpu) { return gpu >= INSTANCE; }

int nvmlInitWithFlags(unsigned int flags) { return OK; }
const char *nvmlErrorString(int code) { return "stand-in"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, uintptr_t *gpu) {
    *gpu = index == 0 ? WHOLE : DIVIDED;
    return index < 2 ? OK : LOST;
}
int nvmlDeviceGetUUID(uintptr_t gpu, char *uuid, unsigned int length) { snprintf(uuid, length, "GPU-%lu", (unsigned long)gpu); return OK; }
int nvmlDeviceGetName(uintptr_t gpu, char *name, unsigned int length) { snprintf(name, length, "NVIDIA H100"); return OK; }

int nvmlDeviceGetMemoryInfo(uintptr_t gpu, struct memory *memory) {
    memory->total = is_instance(gpu) ? 10 : 80;
    memory->used = is_instance(gpu) ? 4 : 60;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(uintptr_t gpu, struct utilization *rates) {
    rates->gpu = 50;
    rates->memory = 25;
    return is_instance(gpu) ? NOT_SUPPORTED : OK;
}

int nvmlDeviceGetPowerUsage(uintptr_t gpu, unsigned int *milliwatts) {
    *milliwatts = 350000;
    return is_instance(gpu) ? NOT_SUPPORTED : OK;
}

int nvmlDeviceGetTemperature(uintptr_t gpu, int sensor, unsigned int *celsius) { *celsius = 61; return OK; }

int nvmlDeviceGetMigMode(uintptr_t gpu, unsigned int *current, unsigned int *pending) {
    *current = *pending = gpu == DIVIDED;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(uintptr_t gpu, unsigned int *count) { *count = 3; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(uintptr_t gpu, unsigned int index, uintptr_t *instance) {
    *instance = INSTANCE + index;
    return index == 1 ? NOT_FOUND : OK;
}
