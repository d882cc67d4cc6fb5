/* LD_PRELOAD: the recency prior (prior.c) in an unmodified program that runs llama.cpp from shared libraries.

   REMOE_PRIOR_CONTROL names the control file (control.py writes it): commands in, status and a log out. Without it, or
   with one that is not ours, nothing is ever touched. The file is read and written by pread and pwrite, so that
   whoever cuts it short cannot end the program by SIGBUS.

   What is known of the program comes from the calls that it makes to libllama: whose row is whose (llama_decode;
   llama_batch_ext_*, llama_process), and what becomes of sequences (llama_memory_*, llama_state_*). A token is computed
   at one gain: the command is looked at once a batch. */
#define _GNU_SOURCE
#include "prior.c"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SHOWN __attribute__((visibility("default")))

/* ---- The control file; control.py has the same in Python ------------------------------------------------------- */

/* Sequences of a program; behind them lie those that hold what llama_state_seq_get_data saved. */
enum { SEQS = 256, SAVED = 32, STATES = SEQS + SAVED, SEGMENTS = 32, RING = 1024 };
enum { AT_COMMANDS = 4096, AT_STATUS = 12288, AT_RING = 16384, CONTROL_BYTES = AT_RING + RING * 64 };
enum { CONTROL_VERSION = 1 };
static const char CONTROL_MAGIC[8] = "REMOEPR1";
enum { BEGIN = 1, GAIN = 2, RESTART = 3 };
/* Status.state; below OFF the values of rp_control.status. */
enum { OFF = 100 };

typedef struct { char magic[8]; uint32_t version, size; } file_head;
/* Two of them, written in turn: the valid one with the higher serial counts, so a half-written one never does. */
typedef struct {
    uint64_t serial;
    float gain, decay;
    uint32_t mode, pages, look_every, n_layer_gain;
    float layer_gain[RP_LAYERS];
    uint64_t check;
} command;
typedef struct {
    uint64_t serial, start_ns, time_ns, written;
    uint32_t pid, state;
    float gain;
    uint32_t mode, contexts, is_blind, n_layers, spare;
    uint64_t tokens, calls, changed_rows, kept, chosen, swapped, ns, mincore_ns;
    uint64_t restarts, rewinds, refused_rows, lost_rows, unproven_rows, batches;
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
static command in_force = {.decay = 0.7f};
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
    if (!(c->gain >= 0 && c->gain <= 16) || !(c->decay >= 0 && c->decay < 1) || c->mode > RP_RESIDENT) return false;
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

/* ---- The program's own functions ------------------------------------------------------------------------------ */

static void *real(const char *name, void *caller) {
    void *f = dlsym(RTLD_NEXT, name);
    if (f) return f;
    Dl_info i;  /* a module that was opened for itself alone, as Python does: its own definition */
    if (!dladdr(caller, &i)) return NULL;
    void *h = dlopen(i.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!h) return NULL;
    f = dlsym(h, name);
    dlclose(h);  /* it stays open: the caller is in it */
    return f;
}
static void *find(const char *name, void *caller) { return real(name, caller); }
#define REAL(type, args) static type(*f) args; if (!f) f = (type(*) args)real(__func__, __builtin_return_address(0))

/* ---- Contexts ------------------------------------------------------------------------------------------------- */

typedef bool (*eval_callback)(tensor *, bool, void *);
/* From `from` on, positions of a sequence are `offset` more to the prior: a context shift moves them, not the state. */
typedef struct { int32_t from, offset; } segment;
typedef struct {
    int32_t next;      /* position that follows; -1: unknown */
    float gain;        /* of its last row */
    bool is_begun;     /* since its tail was removed no row came */
    int n_segments;
    segment segments[SEGMENTS];
} sequence;
typedef struct context {
    struct context *after;
    void *ctx, *memory;
    int number;
    rp *p;
    rp_control own, last;  /* what the core counts, and how far that is in the status */
    bool is_off;
    sequence seqs[SEQS];
    /* The batch under way, in the order in which it is computed. */
    int n, capacity, done, previous, split;
    uint32_t n_ubatch, n_seq_max;
    bool is_unified, is_single, is_lost, in_batch;
    int32_t *seq, *pos, *token, *core_pos, *order;
    int8_t *out;
    bool *used;
    tensor *pos_t, *token_t;
    bool (*is_host)(void *);
    /* hash of saved bytes -> sequence SEQS + i of the core */
    uint64_t saved[SAVED], saved_at[SAVED], clock;
    sequence saved_seq[SAVED];
} context;
/* A scheduler of ggml: whose, and the callback that the program itself wanted. */
typedef struct sched_record { struct sched_record *after; void *sched; context *c; eval_callback theirs; void *user; bool asked; } sched_record;
static context *contexts;
static sched_record *scheds;
static int n_contexts;
static __thread context *current;

static void restart(context *c, int s) {
    rp_restart(c->p, s);
    c->seqs[s].n_segments = 0;
    c->seqs[s].next = -1;
    log_event(RESTART, c->number, s, -1, 0, c->own.gain);
}
static void forget(context *c, int s) {
    rp_reset(c->p, s);
    c->seqs[s] = (sequence){.next = -1, .gain = -1, .is_begun = true};
}

static context *context_by(void *ctx, void *memory) {
    for (context *c = contexts; c; c = c->after) if ((ctx && c->ctx == ctx) || (memory && c->memory == memory)) return c;
    return NULL;
}

static context *context_make(void *ctx, void *caller) {
    context *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    rp_defaults(&c->own);
    c->p = rp_new(STATES, &c->own);
    if (!c->p) { free(c); return NULL; }
    c->ctx = ctx;
    c->number = n_contexts++;
    c->split = -1;
    void *(*memory)(void *) = (void *(*)(void *))real("llama_get_memory", caller);
    uint32_t (*n_ubatch)(void *) = (uint32_t(*)(void *))real("llama_n_ubatch", caller), (*n_seq)(void *) = (uint32_t(*)(void *))real("llama_n_seq_max", caller);
    uint32_t (*n_ctx)(void *) = (uint32_t(*)(void *))real("llama_n_ctx", caller), (*n_ctx_seq)(void *) = (uint32_t(*)(void *))real("llama_n_ctx_seq", caller);
    c->memory = memory ? memory(ctx) : NULL;
    c->n_ubatch = n_ubatch ? n_ubatch(ctx) : 512;
    c->n_seq_max = n_seq ? n_seq(ctx) : 1;
    /* Without one cache for all, each sequence has a share of the positions. */
    c->is_unified = c->n_seq_max <= 1 || !n_ctx || !n_ctx_seq || n_ctx(ctx) == n_ctx_seq(ctx);
    c->is_host = (bool (*)(void *))real("ggml_backend_buffer_is_host", caller);
    rp_backend(c->p, real("ggml_op_desc", caller), real("ggml_backend_buffer_is_host", caller), real("ggml_backend_tensor_get", caller), real("ggml_backend_tensor_set", caller));
    rp_renorm(c->p, getenv("REMOE_PRIOR_RENORM") != NULL);
    if (rp_probe(c->p, find, caller) != RP_ON) c->is_off = true;
    for (int s = 0; s < SEQS; s++) c->seqs[s] = (sequence){.next = -1, .gain = -1, .is_begun = true};
    c->after = contexts;
    contexts = c;
    now_status.contexts++;
    return c;
}

static void context_free(void *ctx) {
    for (context **at = &contexts; *at; at = &(*at)->after) {
        context *c = *at;
        if (c->ctx != ctx) continue;
        *at = c->after;
        for (sched_record *r = scheds; r; r = r->after) if (r->c == c) r->c = NULL;
        rp_free(c->p);
        free(c->seq); free(c->pos); free(c->token); free(c->core_pos); free(c->order); free(c->out); free(c->used);
        free(c);
        return;
    }
}

/* ---- The rows of a batch --------------------------------------------------------------------------------------- */

static bool make_room(context *c, int n) {
    if (n <= c->capacity) return true;
    int more = n + n / 2;
    void *seq = realloc(c->seq, sizeof(int32_t) * more); if (seq) c->seq = seq;
    void *pos = realloc(c->pos, sizeof(int32_t) * more); if (pos) c->pos = pos;
    void *token = realloc(c->token, sizeof(int32_t) * more); if (token) c->token = token;
    void *core = realloc(c->core_pos, sizeof(int32_t) * more); if (core) c->core_pos = core;
    void *order = realloc(c->order, sizeof(int32_t) * more); if (order) c->order = order;
    void *out = realloc(c->out, more); if (out) c->out = out;
    void *used = realloc(c->used, more); if (used) c->used = used;
    if (!seq || !pos || !token || !core || !order || !out || !used) return false;
    c->capacity = more;
    return true;
}

/* How llama.cpp cuts a batch (llama-batch.cpp): in order; sequences side by side, equally many tokens of each, those
   with rising numbers only or any; one sequence after the other. */
enum { SIMPLE, EQUAL_RISING, EQUAL, BY_SEQUENCE, SPLITS };

static void split_rows(context *c, int kind) {
    int n = c->n, at = 0;
    if (kind == SIMPLE || n == 0) { for (int i = 0; i < n; i++) c->order[i] = i; return; }
    memset(c->used, 0, (size_t)n * sizeof *c->used);
    while (at < n) {
        int taken[SEQS], n_taken = 0, last = -1;
        bool in[SEQS] = {false};
        for (int i = 0; i < n && n_taken < SEQS; i++) {
            int s = c->seq[i];
            if (c->used[i] || in[s]) continue;
            if (kind == EQUAL_RISING && n_taken && s != last + 1) continue;
            if (kind == BY_SEQUENCE && n_taken) break;
            in[s] = true; taken[n_taken++] = s; last = s;
            if ((uint32_t)n_taken > c->n_ubatch) break;
        }
        /* As many of each as the shortest has, and as fit. */
        int each = n;
        for (int t = 0; t < n_taken; t++) {
            int left = 0;
            for (int i = 0; i < n; i++) left += !c->used[i] && c->seq[i] == taken[t];
            if (left < each) each = left;
        }
        int fit = (int)(c->n_ubatch / (uint32_t)n_taken);
        if (fit < 1) fit = 1;
        if (each > fit) each = fit;
        for (int t = 0; t < n_taken; t++)
            for (int i = 0, k = 0; i < n && k < each; i++)
                if (!c->used[i] && c->seq[i] == taken[t]) { c->used[i] = true; c->order[at++] = i; k++; }
    }
}

static int32_t core_position(const sequence *s, int32_t pos) {
    int32_t offset = 0;
    for (int i = 0; i < s->n_segments; i++) if (pos >= s->segments[i].from) offset = s->segments[i].offset;
    return pos + offset;
}

static void rows_begin(context *c) {
    c->done = 0; c->previous = RP_LAYERS; c->pos_t = c->token_t = NULL; c->is_lost = false; c->is_single = true;
    read_command();
    c->own.gain = in_force.gain; c->own.decay = in_force.decay; c->own.mode = in_force.mode; c->own.pages = in_force.pages;
    c->own.look_every = in_force.look_every; c->own.n_layer_gain = in_force.n_layer_gain;
    memcpy(c->own.layer_gain, in_force.layer_gain, sizeof c->own.layer_gain);
    for (int i = 0; i < c->n; i++) {
        /* llama.cpp refuses sequences beyond 256; should it not, theirs are rows of nobody. */
        if (c->seq[i] < 0 || c->seq[i] >= SEQS) { c->seq[i] = 0; c->is_lost = true; }
        c->is_single = c->is_single && c->seq[i] == c->seq[0];
    }
    if (c->is_lost) c->own.gain = 0;
    if (c->split < 0) c->split = c->is_unified ? SIMPLE : EQUAL_RISING;
    split_rows(c, c->is_single ? SIMPLE : c->split);
    int32_t *seq = c->seq, *pos = c->core_pos;
    /* Events are of the batch's own order, in which the positions of a sequence rise. */
    for (int i = 0; i < c->n; i++) {
        sequence *s = &c->seqs[seq[i]];
        /* After a shift to the front a position 0 could mean two tokens; a text that begins anew has its tail removed. */
        if (c->pos[i] == 0 && s->n_segments && s->is_begun) s->n_segments = 0;
        bool begins = s->is_begun || s->next != c->pos[i];
        if (begins || s->gain != c->own.gain) log_event(begins ? BEGIN : GAIN, c->number, seq[i], c->pos[i], c->n, c->own.gain);
        s->is_begun = false; s->gain = c->own.gain; s->next = c->pos[i] + 1;
    }
    static __thread int32_t *sorted; static __thread int room;
    if (room < 2 * c->n) { int32_t *more = realloc(sorted, sizeof(int32_t) * 2 * c->n); if (!more) { c->is_lost = true; return; } sorted = more; room = 2 * c->n; }
    static __thread int8_t *flags; static __thread int flag_room;
    if (flag_room < c->n) { int8_t *more = realloc(flags, (size_t)c->n); if (!more) { c->is_lost = true; return; } flags = more; flag_room = c->n; }
    for (int i = 0; i < c->n; i++) {
        int r = c->order[i];
        sorted[i] = seq[r]; sorted[c->n + i] = pos[i] = core_position(&c->seqs[seq[r]], c->pos[r]); flags[i] = c->out[r];
    }
    rp_rows(c->p, c->n, sorted, sorted + c->n, flags);
}

static void rows_end(context *c, int status) {
    bool seen[SEQS] = {false};
    if (c->is_lost || status != 0)
        for (int i = 0; i < c->n; i++) if (!seen[c->seq[i]]) { seen[c->seq[i]] = true; if (c->is_lost) restart(c, c->seq[i]); else c->seqs[c->seq[i]].next = -1; }
#define ADD(name) now_status.name += c->own.name - c->last.name; c->last.name = c->own.name
    ADD(tokens); ADD(calls); ADD(changed_rows); ADD(kept); ADD(chosen); ADD(swapped); ADD(ns); ADD(mincore_ns);
    ADD(restarts); ADD(rewinds); ADD(refused_rows); ADD(lost_rows); ADD(unproven_rows);
#undef ADD
    now_status.batches++;
    now_status.serial = in_force.serial; now_status.gain = in_force.gain; now_status.mode = in_force.mode;
    now_status.is_blind = c->own.is_blind; now_status.n_layers = c->own.n_layers;
    uint32_t state = c->own.status;
    if (c->is_off || (state != RP_ON && state != RP_WAITING)) {
        c->is_off = true;
        /* A draft model without experts beside one that has some is no reason to call it off. */
        if (now_status.state != RP_ON) stay_off(rp_why(state));
    } else if (now_status.state != OFF || state == RP_ON) {
        now_status.state = state; now_status.reason[0] = 0;
    }
    write_status();
}

/* ---- The callback ---------------------------------------------------------------------------------------------- */

/* Whether the rows that are computed are those that were expected; `rows` of them. */
static bool as_expected(context *c, int rows) {
    tensor *both[2] = {c->pos_t, c->token_t};
    if (c->done + rows > c->n) return false;
    for (int b = 0; b < 2; b++) {
        tensor *t = both[b];
        if (!t || !t->data || t->type != 26 || t->ne[0] < rows || (t->buffer && c->is_host && !c->is_host(t->buffer))) continue;
        const int32_t *value = t->data, *want = b ? c->token : c->pos;
        for (int i = 0; i < rows; i++) { int32_t w = want[c->order[c->done + i]]; if (w != value[i] && w >= 0) return false; }
    }
    return true;
}

static void note_inputs(context *c, tensor *t) {
    tensor *s = t->src[1];
    if (!s || s->type != 26 || s->op != 0) return;
    if (!c->pos_t && strstr(s->name, "inp_pos") && !strstr(s->name, "bucket")) c->pos_t = s;
    else if (!c->token_t && strstr(s->name, "inp_tokens")) c->token_t = s;
}

static void graph_begins(context *c, tensor *t) {
    int rows = (int)(c->token_t ? c->token_t->ne[0] : t->ne[1]);
    /* Where the first layer with experts sees rows with outputs alone, the core cannot tell whose they are. */
    if (rows != (int)t->ne[1] || !as_expected(c, rows)) {
        /* Another way to cut batches than was thought: these rows go without prior, the next batch is cut otherwise. */
        c->is_lost = true;
        c->own.gain = 0;
        if (!c->is_single) c->split = (c->split + 1) % SPLITS;
    }
    c->done += rows;
    c->pos_t = c->token_t = NULL;
}

static bool chained(tensor *t, bool ask, void *user) {
    sched_record *r = user;
    context *c = current && r->c == current && !current->is_off ? current : NULL;
    if (ask) {
        bool ours = false;
        if (c) {
            if (!c->pos_t || !c->token_t) note_inputs(c, t);
            if (!strncmp(t->name, "ffn_moe_topk-", 13)) {
                int layer = atoi(t->name + 13);
                if (layer <= c->previous) graph_begins(c, t);
                c->previous = layer;
            }
            ours = rp_cb(t, true, c->p);
        }
        r->asked = r->theirs && r->theirs(t, true, r->user);
        return ours || r->asked;
    }
    bool go = c ? rp_cb(t, false, c->p) : true;
    if (r->asked) { r->asked = false; go = r->theirs(t, false, r->user) && go; }
    return go;
}

SHOWN void ggml_backend_sched_set_eval_callback(void *sched, eval_callback cb, void *user) {
    REAL(void, (void *, eval_callback, void *));
    if (!f) return;
    pthread_mutex_lock(&lock);
    sched_record *r = NULL;
    for (r = scheds; r && r->sched != sched; r = r->after);
    context *c = current && !current->is_off ? current : NULL;
    if (c && !r && (r = calloc(1, sizeof *r))) { r->sched = sched; r->after = scheds; scheds = r; }
    if (r) { r->c = c; r->theirs = cb; r->user = user; r->asked = false; }
    pthread_mutex_unlock(&lock);
    if (r && c) f(sched, chained, r); else f(sched, cb, user);
}

SHOWN void ggml_backend_sched_free(void *sched) {
    REAL(void, (void *));
    if (f) f(sched);
    pthread_mutex_lock(&lock);
    for (sched_record **at = &scheds; *at; at = &(*at)->after)
        if ((*at)->sched == sched) { sched_record *r = *at; *at = r->after; free(r); break; }
    pthread_mutex_unlock(&lock);
}

SHOWN void llama_free(void *ctx) {
    REAL(void, (void *));
    if (f) f(ctx);
    pthread_mutex_lock(&lock);
    context_free(ctx);
    pthread_mutex_unlock(&lock);
}

/* ---- Batches ---------------------------------------------------------------------------------------------------- */

typedef struct { int32_t n_tokens; int32_t *token; float *embd; int32_t *pos, *n_seq_id; int32_t **seq_id; int8_t *logits; } batch_t;

/* The context of a call, ready for its batch of n rows; NULL: without the prior. Returns with the lock held. */
static context *enter(void *ctx, int n, void *caller) {
    pthread_mutex_lock(&lock);
    if (n < 1 || !control_open()) return NULL;
    context *c = context_by(ctx, NULL);
    if (!c) c = context_make(ctx, caller);
    if (!c || c->in_batch || !make_room(c, n)) return NULL;
    c->n = n;
    return c;
}
/* The program's own call is made between these, without the lock. */
static context *go_in(context *c, context **before) {
    *before = current;
    if (c) { rows_begin(c); c->in_batch = true; }
    current = c;
    pthread_mutex_unlock(&lock);
    return c;
}
static void come_out(context *c, context *before, int status) {
    current = before;
    if (!c) return;
    pthread_mutex_lock(&lock);
    c->in_batch = false;
    rows_end(c, status);
    pthread_mutex_unlock(&lock);
}

SHOWN int32_t llama_decode(void *ctx, batch_t batch) {
    REAL(int32_t, (void *, batch_t));
    if (!f) return -1;
    void *caller = __builtin_return_address(0);
    context *before, *c = enter(ctx, batch.n_tokens, caller);
    if (c) {
        int32_t (*last)(void *, int32_t) = (int32_t(*)(void *, int32_t))real("llama_memory_seq_pos_max", caller);
        int32_t next[SEQS];
        memset(next, 0xff, sizeof next);
        for (int i = 0; i < c->n; i++) {
            int s = batch.seq_id && batch.seq_id[i] ? batch.seq_id[i][0] : 0;
            c->seq[i] = s;
            c->token[i] = batch.token ? batch.token[i] : -1;
            /* Without flags the last row alone has an output. */
            c->out[i] = batch.logits ? batch.logits[i] != 0 : i == c->n - 1;
            if (batch.pos) c->pos[i] = batch.pos[i];
            else if (s < 0 || s >= SEQS) c->pos[i] = -1;
            else {
                if (next[s] < 0) next[s] = last && c->memory ? last(c->memory, s) + 1 : 0;
                c->pos[i] = next[s]++;
            }
            for (int j = 1; batch.seq_id && batch.n_seq_id && j < batch.n_seq_id[i]; j++) {
                int other = batch.seq_id[i][j];
                /* A token of several sequences is computed once, with the state of the first of them. */
                if (other >= 0 && other < SEQS && other != s && c->seqs[other].next >= 0) restart(c, other);
            }
        }
    }
    go_in(c, &before);
    int32_t status = f(ctx, batch);
    come_out(c, before, status);
    return status;
}

/* llama.cpp of late 2026 has a second, opaque kind of batch; what is in it is known from the calls that fill it. */
typedef struct shadow { struct shadow *after; void *batch; int n, room; int32_t *seq, *pos, *token, *other; int8_t *out; } shadow;
static shadow *shadows;

static shadow *shadow_of(void *batch) {
    shadow *s = shadows;
    for (; s && s->batch != batch; s = s->after);
    return s;
}
static void shadow_free(void *batch) {
    for (shadow **at = &shadows; *at; at = &(*at)->after) {
        shadow *s = *at;
        if (s->batch != batch) continue;
        *at = s->after;
        free(s->seq); free(s->pos); free(s->token); free(s->other); free(s->out); free(s);
        return;
    }
}
static void shadow_add(void *batch, int row, int32_t seq, int32_t token) {
    shadow *s = shadow_of(batch);
    if (!s) {
        if (!(s = calloc(1, sizeof *s))) return;
        s->batch = batch; s->after = shadows; shadows = s;
    }
    if (row < 0) return;
    if (row >= s->room) {
        int room = row + row / 2 + 64;
        int32_t *a = realloc(s->seq, 4 * (size_t)room); if (a) s->seq = a;
        int32_t *b = realloc(s->pos, 4 * (size_t)room); if (b) s->pos = b;
        int32_t *c = realloc(s->token, 4 * (size_t)room); if (c) s->token = c;
        int32_t *d = realloc(s->other, 4 * (size_t)room); if (d) s->other = d;
        int8_t *e = realloc(s->out, (size_t)room); if (e) s->out = e;
        if (!a || !b || !c || !d || !e) { shadow_free(batch); return; }
        s->room = room;
    }
    s->seq[row] = seq; s->token[row] = token; s->pos[row] = -1; s->other[row] = -1; s->out[row] = 0;
    s->n = row + 1;
}
#define LOCKED(body) do { pthread_mutex_lock(&lock); body; pthread_mutex_unlock(&lock); } while (0)

SHOWN void *llama_batch_ext_init(void *ctx) {
    REAL(void *, (void *));
    void *b = f ? f(ctx) : NULL;
    LOCKED(shadow_free(b));
    return b;
}
SHOWN void llama_batch_ext_free(void *b) {
    REAL(void, (void *));
    if (f) f(b);
    LOCKED(shadow_free(b));
}
SHOWN void llama_batch_ext_clear(void *b) {
    REAL(void, (void *));
    if (f) f(b);
    LOCKED(shadow *s = shadow_of(b); if (s) s->n = 0);
}
SHOWN int32_t llama_batch_ext_add(void *b, int32_t seq) {
    REAL(int32_t, (void *, int32_t));
    int32_t row = f ? f(b, seq) : -1;
    LOCKED(shadow_add(b, row, seq, -1));
    return row;
}
SHOWN int32_t llama_batch_ext_add_token(void *b, int32_t seq, int32_t id) {
    REAL(int32_t, (void *, int32_t, int32_t));
    int32_t row = f ? f(b, seq, id) : -1;
    LOCKED(shadow_add(b, row, seq, id));
    return row;
}
typedef struct { const float *data; size_t n_rows, n_embd; } embd_t;
SHOWN int32_t llama_batch_ext_add_embd(void *b, int32_t seq, embd_t embd) {
    REAL(int32_t, (void *, int32_t, embd_t));
    int32_t row = f ? f(b, seq, embd) : -1;
    LOCKED(shadow_add(b, row, seq, -1));
    return row;
}
SHOWN bool llama_batch_ext_add_seq(void *b, int32_t i, int32_t seq) {
    REAL(bool, (void *, int32_t, int32_t));
    bool done = f && f(b, i, seq);
    LOCKED(shadow *s = shadow_of(b); if (done && s && i >= 0 && i < s->n && s->seq[i] != seq) s->other[i] = seq);
    return done;
}
SHOWN bool llama_batch_ext_set_pos(void *b, int32_t i, const int32_t *pos) {
    REAL(bool, (void *, int32_t, const int32_t *));
    bool done = f && f(b, i, pos);
    LOCKED(shadow *s = shadow_of(b); if (done && s && i >= 0 && i < s->n) s->pos[i] = pos[0]);
    return done;
}
static void set_output(void *b, int32_t i, bool value) {
    LOCKED(shadow *s = shadow_of(b); if (s && i >= 0 && i < s->n) s->out[i] = value);
}
SHOWN bool llama_batch_ext_set_output_logits(void *b, int32_t i, bool value) {
    REAL(bool, (void *, int32_t, bool));
    bool done = f && f(b, i, value);
    if (done) set_output(b, i, value);
    return done;
}
SHOWN bool llama_batch_ext_set_output_embd(void *b, int32_t i, bool value) {
    REAL(bool, (void *, int32_t, bool));
    bool done = f && f(b, i, value);
    if (done) set_output(b, i, value);
    return done;
}
SHOWN int32_t llama_process(void *ctx, int type, void *b) {
    REAL(int32_t, (void *, int, void *));
    if (!f) return -1;
    if (type != 1) {  /* an encoder has no sequences to remember */
        context *before = current;
        current = NULL;
        int32_t status = f(ctx, type, b);
        current = before;
        return status;
    }
    pthread_mutex_lock(&lock);
    shadow *s = shadow_of(b);
    int n = s ? s->n : 0;
    pthread_mutex_unlock(&lock);
    context *before, *c = enter(ctx, n, __builtin_return_address(0));
    if (c) {
        memcpy(c->seq, s->seq, 4 * (size_t)n); memcpy(c->pos, s->pos, 4 * (size_t)n);
        memcpy(c->token, s->token, 4 * (size_t)n); memcpy(c->out, s->out, (size_t)n);
        for (int i = 0; i < n; i++)
            if (s->other[i] >= 0 && s->other[i] < SEQS && c->seqs[s->other[i]].next >= 0) restart(c, s->other[i]);
    }
    go_in(c, &before);
    int32_t status = f(ctx, type, b);
    come_out(c, before, status);
    return status;
}

/* ---- What becomes of sequences ---------------------------------------------------------------------------------- */

static void after_rm(context *c, int seq, int32_t p0, int32_t p1) {
    for (int s = 0; s < SEQS; s++) {
        if (seq >= 0 && s != seq) continue;
        sequence *q = &c->seqs[s];
        if (p1 >= 0 && q->next > p1) continue;  /* what comes last stays, and with it what was chosen last */
        if (p0 <= 0) forget(c, s);
        else { q->is_begun = true; while (q->n_segments && q->segments[q->n_segments - 1].from >= p0) q->n_segments--; }
    }
}
static void after_cp(context *c, int from, int to, int32_t p1) {
    if (from < 0 || to < 0 || from >= SEQS || to >= SEQS || from == to) return;
    rp_copy(c->p, from, to);
    c->seqs[to] = c->seqs[from];
    c->seqs[to].is_begun = true;
    if (p1 >= 0 && p1 < c->seqs[from].next) rp_rewind(c->p, to, core_position(&c->seqs[to], p1));
}
static void after_add(context *c, int seq, int32_t p0, int32_t p1, int32_t by) {
    for (int i = 0; i < SEQS; i++) {
        if (seq >= 0 && i != seq) continue;
        sequence *s = &c->seqs[i];
        int32_t from = p0 < 0 ? 0 : p0;
        if (s->next <= from || !by) continue;
        /* Only the tail as a whole keeps the order of what was seen. */
        if ((p1 >= 0 && p1 < s->next) || s->n_segments == SEGMENTS || from + by < 0) { restart(c, i); continue; }
        int32_t offset = core_position(s, from) - from, kept = 0;
        for (int j = 0; j < s->n_segments; j++) {
            segment g = s->segments[j];
            if (g.from > from) { if (by < 0 || kept) { restart(c, i); kept = -1; break; } g.from += by; g.offset -= by; }
            if (g.from < from + by || g.from > from) s->segments[kept++] = g;
        }
        if (kept < 0) continue;
        s->n_segments = kept;
        s->segments[s->n_segments++] = (segment){from + by, offset - by};
        s->next += by;
    }
}
static void after_keep(context *c, int seq) { for (int s = 0; s < SEQS; s++) if (s != seq) forget(c, s); }
static void after_clear(context *c) { for (int s = 0; s < SEQS; s++) forget(c, s); }
static void after_div(context *c, int seq) { for (int s = 0; s < SEQS; s++) if (seq < 0 || s == seq) restart(c, s); }

/* Draft and target model may share a memory: all contexts with it are told. Older builds name the context instead. */
#define FOR_MEMORY(mem, body) LOCKED(for (context *c = contexts; c; c = c->after) if (c->memory == (mem) || c->ctx == (mem)) { body; })
#define MEMORY_RM(name) SHOWN bool name(void *mem, int32_t seq, int32_t p0, int32_t p1) { \
    REAL(bool, (void *, int32_t, int32_t, int32_t)); \
    bool done = f && f(mem, seq, p0, p1); \
    if (done) FOR_MEMORY(mem, after_rm(c, seq, p0, p1)); \
    return done; }
#define MEMORY_CP(name) SHOWN void name(void *mem, int32_t from, int32_t to, int32_t p0, int32_t p1) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int32_t)); \
    if (f) f(mem, from, to, p0, p1); \
    FOR_MEMORY(mem, after_cp(c, from, to, p1)); }
#define MEMORY_KEEP(name) SHOWN void name(void *mem, int32_t seq) { \
    REAL(void, (void *, int32_t)); \
    if (f) f(mem, seq); \
    FOR_MEMORY(mem, after_keep(c, seq)); }
#define MEMORY_ADD(name) SHOWN void name(void *mem, int32_t seq, int32_t p0, int32_t p1, int32_t by) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int32_t)); \
    if (f) f(mem, seq, p0, p1, by); \
    FOR_MEMORY(mem, after_add(c, seq, p0, p1, by)); }
#define MEMORY_DIV(name) SHOWN void name(void *mem, int32_t seq, int32_t p0, int32_t p1, int by) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int)); \
    if (f) f(mem, seq, p0, p1, by); \
    FOR_MEMORY(mem, after_div(c, seq)); }
MEMORY_RM(llama_memory_seq_rm) MEMORY_RM(llama_kv_self_seq_rm)
MEMORY_CP(llama_memory_seq_cp) MEMORY_CP(llama_kv_self_seq_cp)
MEMORY_KEEP(llama_memory_seq_keep) MEMORY_KEEP(llama_kv_self_seq_keep)
MEMORY_ADD(llama_memory_seq_add) MEMORY_ADD(llama_kv_self_seq_add)
MEMORY_DIV(llama_memory_seq_div) MEMORY_DIV(llama_kv_self_seq_div)
SHOWN void llama_memory_clear(void *mem, bool data) {
    REAL(void, (void *, bool));
    if (f) f(mem, data);
    FOR_MEMORY(mem, after_clear(c));
}
SHOWN void llama_kv_self_clear(void *mem) {
    REAL(void, (void *));
    if (f) f(mem);
    FOR_MEMORY(mem, after_clear(c));
}

/* Saved states are known again by their bytes, whoever carries them about. A partial one (flag 1: recurrent or sliding
   memory) lies beside a cache that keeps its positions, which say where its sequence goes on; one on a device (flag 2)
   has no bytes to be known by. */
enum { PARTIAL = 1, ON_DEVICE = 2 };
static __thread bool is_inner;

static void after_save(context *c, int seq, const void *data, size_t bytes) {
    if (seq < 0 || seq >= SEQS || !bytes) return;
    uint64_t hash = check_of(data, bytes);
    int slot = 0;
    for (int i = 0; i < SAVED; i++) {
        if (c->saved[i] == hash) { slot = i; break; }
        if (c->saved_at[i] < c->saved_at[slot]) slot = i;
    }
    c->saved[slot] = hash; c->saved_at[slot] = ++c->clock; c->saved_seq[slot] = c->seqs[seq];
    rp_copy(c->p, seq, SEQS + slot);
}
static void after_load(context *c, int seq, const void *data, size_t bytes) {
    if (seq < 0 || seq >= SEQS) return;
    forget(c, seq);
    if (!data) return;
    uint64_t hash = check_of(data, bytes);
    for (int i = 0; i < SAVED; i++) if (c->saved_at[i] && c->saved[i] == hash) {
        rp_copy(c->p, SEQS + i, seq);
        c->seqs[seq] = c->saved_seq[i];
        c->seqs[seq].is_begun = true;
        c->saved_at[i] = ++c->clock;
        return;
    }
}
#define FOR_CONTEXT(ctx, body) LOCKED(context *c = context_by(ctx, NULL); if (c) { body; })

static void saved(void *ctx, const void *data, size_t bytes, int32_t seq, uint32_t flags) {
    if (bytes && !flags) FOR_CONTEXT(ctx, after_save(c, seq, data, bytes));
}
static void loaded(void *ctx, const void *data, size_t bytes, int32_t seq, uint32_t flags) {
    if (bytes && !(flags & PARTIAL)) FOR_CONTEXT(ctx, after_load(c, seq, flags & ON_DEVICE ? NULL : data, bytes));
}
SHOWN size_t llama_state_seq_get_data(void *ctx, uint8_t *out, size_t size, int32_t seq) {
    REAL(size_t, (void *, uint8_t *, size_t, int32_t));
    bool inner = is_inner;
    is_inner = true;
    size_t bytes = f ? f(ctx, out, size, seq) : 0;
    is_inner = inner;
    if (!inner) saved(ctx, out, bytes, seq, 0);
    return bytes;
}
SHOWN size_t llama_state_seq_get_data_ext(void *ctx, uint8_t *out, size_t size, int32_t seq, uint32_t flags) {
    REAL(size_t, (void *, uint8_t *, size_t, int32_t, uint32_t));
    size_t bytes = f ? f(ctx, out, size, seq, flags) : 0;
    if (!is_inner) saved(ctx, out, bytes, seq, flags);
    return bytes;
}
SHOWN size_t llama_state_seq_set_data(void *ctx, const uint8_t *in, size_t size, int32_t seq) {
    REAL(size_t, (void *, const uint8_t *, size_t, int32_t));
    bool inner = is_inner;
    is_inner = true;
    size_t bytes = f ? f(ctx, in, size, seq) : 0;
    is_inner = inner;
    if (!inner) loaded(ctx, in, bytes ? size : 0, seq, 0);
    return bytes;
}
SHOWN size_t llama_state_seq_set_data_ext(void *ctx, const uint8_t *in, size_t size, int32_t seq, uint32_t flags) {
    REAL(size_t, (void *, const uint8_t *, size_t, int32_t, uint32_t));
    size_t bytes = f ? f(ctx, in, size, seq, flags) : 0;
    if (!is_inner) loaded(ctx, in, bytes ? size : 0, seq, flags);
    return bytes;
}
/* A file may be of another run: what it holds begins anew, and is counted when it goes on. */
SHOWN size_t llama_state_seq_load_file(void *ctx, const char *path, int32_t seq, int32_t *tokens, size_t room, size_t *count) {
    REAL(size_t, (void *, const char *, int32_t, int32_t *, size_t, size_t *));
    size_t bytes = f ? f(ctx, path, seq, tokens, room, count) : 0;
    if (bytes && tokens) loaded(ctx, NULL, bytes, seq, ON_DEVICE);
    return bytes;
}
SHOWN size_t llama_state_set_data(void *ctx, const uint8_t *in, size_t size) {
    REAL(size_t, (void *, const uint8_t *, size_t));
    size_t bytes = f ? f(ctx, in, size) : 0;
    FOR_CONTEXT(ctx, after_clear(c));
    return bytes;
}
SHOWN bool llama_state_load_file(void *ctx, const char *path, int32_t *tokens, size_t room, size_t *count) {
    REAL(bool, (void *, const char *, int32_t *, size_t, size_t *));
    bool done = f && f(ctx, path, tokens, room, count);
    FOR_CONTEXT(ctx, after_clear(c));
    return done;
}
