/* The control file of a preloaded program (control.py has the same in Python): commands in, status and a log out. The
   file is read and written by pread and pwrite, so that whoever cuts it short cannot end the program by SIGBUS. */
#pragma once
#include "prior.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Sequences of a program; behind them lie those that hold what llama_state_seq_get_data saved. */
enum { SEQS = 256, SAVED = 32, STATES = SEQS + SAVED, SEGMENTS = 32, RING = 1024 };
enum { AT_COMMANDS = 4096, AT_STATUS = 12288, AT_RING = 16384, CONTROL_BYTES = AT_RING + RING * 64 };
enum { CONTROL_VERSION = 3 };
static const char CONTROL_MAGIC[8] = "REMOEPR1";
enum { BEGIN = 1, GAIN = 2, RESTART = 3 };
/* Status.state; below OFF the values of rp_control.status. */
enum { OFF = 100 };

typedef struct { char magic[8]; uint32_t version, size; } file_head;
/* Two of them, written in turn: the valid one with the higher serial counts, so a half-written one never does. */
typedef struct {
    uint64_t serial;
    float gain, budget_share;
    uint32_t mode, pages, look_every, n_layer_gain;
    uint64_t budget_bytes;
    double decay, share;
    float layer_gain[RP_LAYERS];
    uint64_t check;
} command;
typedef struct {
    uint64_t serial, start_ns, time_ns, written;
    uint32_t pid, state;
    float gain;
    uint32_t mode, contexts, is_blind, n_layers, ahead_state;
    uint64_t tokens, calls, changed_rows, kept, chosen, swapped, ns, mincore_ns;
    uint64_t restarts, rewinds, refused_rows, lost_rows, unproven_rows, batches;
    uint64_t ahead_hits, ahead_misses, ahead_stale, ahead_spilled, ahead_dropped, ahead_bytes, ahead_failed, ahead_ns;
    uint64_t held_bytes;
    char reason[256];
    uint64_t check;
} status_block;
typedef struct {
    uint64_t number, time_ns;
    int32_t context, seq, pos, rows;
    float gain;
    uint32_t kind;
    uint64_t serial;
    uint32_t pid, spare;
    uint64_t check;
} event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int control_fd = -1;
static bool control_tried;
static command in_force = {.decay = USUAL_DECAY, .share = USUAL_SHARE};
static status_block now_status;

/* FNV-1a over 64-bit words: https://datatracker.ietf.org/doc/html/draft-eastlake-fnv */
static uint64_t check_of(const void *data, size_t bytes) {
    uint64_t h = 14695981039346656037ull, w;
    const char *p = data;
    for (; bytes >= 8; bytes -= 8, p += 8) { memcpy(&w, p, 8); h = (h ^ w) * 1099511628211ull; h ^= h >> 29; }
    for (; bytes; bytes--, p++) h = (h ^ (unsigned char)*p) * 1099511628211ull;
    return h;
}

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void say(const char *text) { fprintf(stderr, "remoe: the recency prior stays off: %s\n", text); }

/* The file as a whole is checked once; what is read later is checked by its own sums. */
static const char *control_fault(int fd) {
    struct stat facts;
    file_head head;
    if (fstat(fd, &facts)) return "the control file cannot be looked at";
    if (!S_ISREG(facts.st_mode)) return "the control file is no regular file";
    if (facts.st_uid != geteuid() && geteuid() != 0) return "the control file belongs to somebody else";
    if (facts.st_size < CONTROL_BYTES) return "the control file is too short";
    if (pread(fd, &head, sizeof head, 0) != (ssize_t)sizeof head) return "the control file cannot be read";
    if (memcmp(head.magic, CONTROL_MAGIC, 8)) return "the control file is not one of remoe";
    if (head.version != CONTROL_VERSION || head.size != CONTROL_BYTES) return "the control file is of another version of remoe";
    return NULL;
}

static bool pread_all(void *out, size_t bytes, off_t at) { return pread(control_fd, out, bytes, at) == (ssize_t)bytes; }

static void write_status(void) {
    if (control_fd < 0) return;
    now_status.time_ns = clock_ns();
    now_status.check = check_of(&now_status, offsetof(status_block, check));
    if (pwrite(control_fd, &now_status, sizeof now_status, AT_STATUS) < 0) return;  /* a full disk: the next one may */
}

/* A file that is not there yet is made, with gain 0: whoever drives it may come later. */
static int control_make(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) return fd;
    file_head head = {.version = CONTROL_VERSION, .size = CONTROL_BYTES};
    memcpy(head.magic, CONTROL_MAGIC, sizeof head.magic);
    if (ftruncate(fd, CONTROL_BYTES) || pwrite(fd, &head, sizeof head, 0) != (ssize_t)sizeof head) { close(fd); unlink(path); return -1; }
    return fd;
}

/* Once a process, at the first batch: a program that only has this library loaded touches no file. */
static bool control_open(void) {
    if (control_tried) return control_fd >= 0;
    control_tried = true;
    const char *path = getenv("REMOE_PRIOR_CONTROL");
    if (!path || !*path) { say("REMOE_PRIOR_CONTROL names no control file"); return false; }
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 && errno == ENOENT) fd = control_make(path);
    char text[512];
    if (fd < 0) { snprintf(text, sizeof text, "%.300s cannot be opened for reading and writing (%s)", path, strerror(errno)); say(text); return false; }
    const char *fault = control_fault(fd);
    if (fault) { snprintf(text, sizeof text, "%.300s: %s", path, fault); say(text); close(fd); return false; }
    control_fd = fd;
    status_block before;
    /* A server that was started anew goes on in the log of the one before it. */
    if (pread_all(&before, sizeof before, AT_STATUS) && before.check == check_of(&before, offsetof(status_block, check))) now_status.written = before.written;
    now_status.pid = (uint32_t)getpid();
    now_status.start_ns = clock_ns();
    write_status();
    return true;
}

static bool sane(const command *c) {
    if (!(c->gain >= 0 && c->gain <= 16) || !(c->decay >= 0 && c->decay < 1) || c->mode > RP_COST) return false;
    if (!(c->budget_share >= 0 && c->budget_share <= 1) || !(c->share >= 0 && c->share <= 1)) return false;
    if (c->n_layer_gain > RP_LAYERS || c->pages > 4096) return false;
    for (uint32_t i = 0; i < c->n_layer_gain; i++) if (!(c->layer_gain[i] >= 0 && c->layer_gain[i] <= 16)) return false;
    return true;
}

/* The newest command that is whole; what is torn, gone or nonsense leaves the one before in force. */
static void read_command(void) {
    for (int slot = 0; slot < 2; slot++) {
        off_t at = AT_COMMANDS + slot * 4096;
        uint64_t serial;
        command c;
        if (!pread_all(&serial, sizeof serial, at) || serial <= in_force.serial) continue;
        if (!pread_all(&c, sizeof c, at) || c.check != check_of(&c, offsetof(command, check)) || !sane(&c)) continue;
        if (c.serial > in_force.serial) in_force = c;
    }
}

static void log_event(uint32_t kind, int context, int seq, int pos, int rows, float gain) {
    event e = {.number = ++now_status.written, .time_ns = clock_ns(), .context = context, .seq = seq, .pos = pos, .rows = rows, .gain = gain, .kind = kind, .serial = in_force.serial, .pid = now_status.pid};
    e.check = check_of(&e, offsetof(event, check));
    if (pwrite(control_fd, &e, sizeof e, AT_RING + (off_t)((e.number - 1) % RING) * 64) < 0) return;
}

static void stay_off(const char *why) {
    if (now_status.state == OFF) return;
    now_status.state = OFF;
    snprintf(now_status.reason, sizeof now_status.reason, "%s", why);
    say(why);
    write_status();
}
