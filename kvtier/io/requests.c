/* Batches of reads and writes on a few threads of their own, which never take the interpreter's lock: what `kvtier.io.pool` does, without
   Python at each request. `kvtier/io/native_pool.py` says what each call means.

   A pool's lock guards the pool and all its batches; it is never held during a system call, nor during what a batch wants done with what
   was read. A batch keeps the memory of its requests (as buffers) until it is gone, and it is not gone before its requests under way have
   ended. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#define STACK_BYTES (1 << 20) /* what is to be done with what was read may need some of it */
#define MOST_CPUS (1 << 16)
#define SIGNALS_EVERY_NS 100000000 /* so long a waiting caller may be deaf to Ctrl-C */

typedef struct Batch Batch;
typedef struct Request Request;

struct Request {
    int file;
    int64_t offset;
    Py_buffer memory;
    int64_t outcome; /* bytes carried, or -errno */
    Batch *batch;
    Request *next; /* of a queue: requests that were read and await what is to be done then */
};

/* What is to be done with a request that was read: `index` of its batch, bytes or -errno, and where they are. */
typedef void Then(void *context, Py_ssize_t index, int64_t outcome, const void *memory);

typedef struct {
    PyObject_HEAD
    pthread_mutex_t lock;
    pthread_cond_t wake;
    Batch *next; /* of a ring: batches with requests that nobody has begun */
    Request *waiting, *last; /* the ends of the queue */
    pthread_t *threads;
    int depth, started;
    int working; /* threads that do what is to be done with what was read */
    int64_t alignment;
    bool stopped;
    cpu_set_t *cpus; /* threads that start are kept on these; NULL: any */
    size_t cpus_bytes;
} Pool;

struct Batch {
    PyObject_HEAD
    Pool *pool;
    Batch *before, *after; /* in the ring; NULL if not in it */
    Request *requests;
    Py_ssize_t *order; /* requests as they ended */
    Py_ssize_t count, begun, ended, told;
    bool writing, helping;
    Then *then; /* NULL: nothing is to be done */
    void *context;
    PyObject *owner; /* of the context */
    int at_once; /* `working` threads with which nothing more of this batch is begun */
    pthread_cond_t progress;
};

/* -- carrying: no interpreter here ------------------------------------------------------------------------------------------- */

static int64_t read_whole(const Request *request, int64_t alignment) {
    int64_t done = 0;
    while (done < request->memory.len) {
        const ssize_t got = pread(request->file, (char *)request->memory.buf + done, (size_t)(request->memory.len - done), request->offset + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -errno;
        done += got;
        if (got == 0 || done % alignment) break; /* a count that is not aligned can only come from the end of the file */
    }
    return done;
}

static int64_t write_whole(const Request *request) {
    int64_t done = 0;
    while (done < request->memory.len) {
        const ssize_t put = pwrite(request->file, (char *)request->memory.buf + done, (size_t)(request->memory.len - done), request->offset + done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return put ? -errno : -EIO;
        done += put;
    }
    return done;
}

static void enter_ring(Pool *pool, Batch *batch) {
    if (!pool->next) pool->next = batch->before = batch->after = batch;
    batch->after = pool->next;
    batch->before = pool->next->before;
    batch->before->after = batch->after->before = batch;
}

static void leave_ring(Pool *pool, Batch *batch) {
    if (!batch->after) return;
    if (pool->next == batch) pool->next = batch->after == batch ? NULL : batch->after;
    batch->before->after = batch->after;
    batch->after->before = batch->before;
    batch->before = batch->after = NULL;
}

/* All that was begun has ended, and nothing more will begin. */
static bool is_over(const Batch *batch) { return batch->ended == batch->begun && !batch->after; }

/* A request has ended. Whoever waits for a batch of which more is to be done has no use for a part of it. */
static void note(Request *request) {
    Batch *batch = request->batch;
    batch->order[batch->ended++] = request - batch->requests;
    if (!batch->then || is_over(batch)) pthread_cond_broadcast(&batch->progress);
}

/* Does what is to be done with what was read, oldest first, while there is some and not enough threads do so already. Otherwise the thread
   goes on to read: those that work look again before they leave. The pool's lock is held, but for the work. */
static void work(Pool *pool) {
    while (pool->waiting && pool->working < pool->waiting->batch->at_once) {
        Request *request = pool->waiting;
        Batch *batch = request->batch;
        pool->waiting = request->next;
        pool->working++;
        pthread_mutex_unlock(&pool->lock);
        batch->then(batch->context, request - batch->requests, request->outcome, request->memory.buf);
        pthread_mutex_lock(&pool->lock);
        pool->working--;
        note(request);
    }
}

/* The next request of a batch that has one. The pool's lock is held, but for the system call. */
static void carry_one(Pool *pool, Batch *batch) {
    Request *request = &batch->requests[batch->begun++];
    if (batch->begun == batch->count) leave_ring(pool, batch);
    pthread_mutex_unlock(&pool->lock);
    request->outcome = batch->writing ? write_whole(request) : read_whole(request, pool->alignment);
    pthread_mutex_lock(&pool->lock);
    if (!batch->then) {
        note(request);
        return;
    }
    request->next = NULL;
    if (pool->waiting) pool->last->next = request;
    else pool->waiting = request;
    pool->last = request;
    work(pool);
}

static void *run(void *argument) {
    Pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    while (pool->next || !pool->stopped) {
        if (pool->next) {
            Batch *batch = pool->next;
            pool->next = batch->after; /* several batches take turns */
            carry_one(pool, batch);
        } else {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void drop_cpus(Pool *pool) {
    if (pool->cpus) CPU_FREE(pool->cpus);
    pool->cpus = NULL;
}

/* Threads until there are `wanted`; fewer where the system gives no more. The lock is held. */
static void start_threads(Pool *pool, Py_ssize_t wanted) {
    sigset_t all, before;
    pthread_attr_t attributes;
    if (pool->started >= wanted || pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (pool->cpus && pthread_attr_setaffinity_np(&attributes, pool->cpus_bytes, pool->cpus)) drop_cpus(pool);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    while (pool->started < wanted) {
        if (pthread_create(&pool->threads[pool->started], &attributes, run, pool)) {
            if (!pool->cpus) break;
            drop_cpus(pool); /* CPUs that the process may not use any more: better anywhere than nowhere */
            pthread_attr_destroy(&attributes);
            if (pthread_attr_init(&attributes)) {
                pthread_sigmask(SIG_SETMASK, &before, NULL);
                return;
            }
            pthread_attr_setstacksize(&attributes, STACK_BYTES);
            continue;
        }
        pthread_setname_np(pool->threads[pool->started++], "kvtier-io");
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Begins nothing more of a batch and waits for what is under way. */
static void withdraw(Batch *batch) {
    pthread_mutex_lock(&batch->pool->lock);
    leave_ring(batch->pool, batch);
    while (batch->ended < batch->begun) pthread_cond_wait(&batch->progress, &batch->pool->lock);
    pthread_mutex_unlock(&batch->pool->lock);
}

/* -- batches ----------------------------------------------------------------------------------------------------------------- */

static void batch_free(PyObject *self) {
    Batch *batch = (Batch *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (batch->pool) {
        Py_BEGIN_ALLOW_THREADS
        withdraw(batch);
        Py_END_ALLOW_THREADS
        pthread_cond_destroy(&batch->progress);
    }
    for (Py_ssize_t i = 0; batch->requests && i < batch->count; i++) {
        if (batch->requests[i].memory.obj) PyBuffer_Release(&batch->requests[i].memory);
    }
    PyMem_Free(batch->requests);
    PyMem_Free(batch->order);
    Py_XDECREF(batch->owner);
    Py_XDECREF((PyObject *)batch->pool);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Whether there is something to tell; of a batch of which more is to be done, all at once. */
static bool can_tell(const Batch *batch) { return is_over(batch) || (!batch->then && batch->told < batch->ended); }

/* Until there is something to tell, or it is time to look for signals. */
static void wait_a_while(Batch *batch) {
    Pool *pool = batch->pool;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += SIGNALS_EVERY_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&pool->lock);
    if (!can_tell(batch)) {
        if (batch->helping && batch->after) carry_one(pool, batch);
        else pthread_cond_timedwait(&batch->progress, &pool->lock, &until);
    }
    pthread_mutex_unlock(&pool->lock);
}

static PyObject *batch_ended(PyObject *self, PyObject *nothing) {
    (void)nothing;
    Batch *batch = (Batch *)self;
    Py_ssize_t ended;
    bool tells;
    do {
        if (PyErr_CheckSignals()) return NULL;
        Py_BEGIN_ALLOW_THREADS
        wait_a_while(batch);
        pthread_mutex_lock(&batch->pool->lock);
        ended = batch->ended;
        tells = can_tell(batch);
        pthread_mutex_unlock(&batch->pool->lock);
        Py_END_ALLOW_THREADS
    } while (!tells);
    PyObject *outcomes = PyList_New(ended - batch->told);
    for (Py_ssize_t i = 0; outcomes && batch->told < ended; i++, batch->told++) {
        const Py_ssize_t index = batch->order[batch->told];
        PyObject *outcome = Py_BuildValue("(nL)", index, (long long)batch->requests[index].outcome);
        if (!outcome || PyList_SetItem(outcomes, i, outcome)) Py_CLEAR(outcomes);
    }
    return outcomes;
}

static PyObject *batch_withdraw(PyObject *self, PyObject *nothing) {
    (void)nothing;
    Py_BEGIN_ALLOW_THREADS
    withdraw((Batch *)self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef batch_methods[] = {
    {"ended", batch_ended, METH_NOARGS, NULL},
    {"withdraw", batch_withdraw, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot batch_slots[] = {{Py_tp_dealloc, batch_free}, {Py_tp_methods, batch_methods}, {0, NULL}};
static PyType_Spec batch_spec = {"kvtier.io._requests.Batch", sizeof(Batch), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                 batch_slots};
static PyTypeObject *batch_type;

/* -- pools ------------------------------------------------------------------------------------------------------------------- */

static PyObject *pool_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    (void)names;
    int depth;
    long long alignment;
    if (!PyArg_ParseTuple(arguments, "iL", &depth, &alignment)) return NULL;
    if (depth < 1 || alignment < 1) return PyErr_Format(PyExc_ValueError, "depth %d, alignment %lld; expected 1 or more", depth, alignment);
    Pool *pool = (Pool *)PyType_GenericAlloc(type, 0);
    if (!pool) return NULL;
    pool->threads = PyMem_Calloc((size_t)depth, sizeof(pthread_t));
    if (!pool->threads || pthread_mutex_init(&pool->lock, NULL) || pthread_cond_init(&pool->wake, NULL)) {
        PyMem_Free(pool->threads);
        pool->threads = NULL;
        Py_DECREF((PyObject *)pool);
        return PyErr_NoMemory();
    }
    pool->depth = depth;
    pool->alignment = alignment;
    return (PyObject *)pool;
}

static void stop(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stopped = true;
    const int threads = pool->started;
    pool->started = 0;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < threads; i++) pthread_join(pool->threads[i], NULL);
}

static void pool_free(PyObject *self) {
    Pool *pool = (Pool *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (pool->threads) {
        Py_BEGIN_ALLOW_THREADS
        stop(pool);
        Py_END_ALLOW_THREADS
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->lock);
        PyMem_Free(pool->threads);
        drop_cpus(pool);
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *pool_keep_on(PyObject *self, PyObject *given) {
    Pool *pool = (Pool *)self;
    if (!PyList_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "expected a list of CPU numbers");
        return NULL;
    }
    const Py_ssize_t count = PyList_Size(given);
    long most = -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        const long cpu = PyLong_AsLong(PyList_GetItem(given, i));
        if (cpu == -1 && PyErr_Occurred()) return NULL;
        if (cpu < 0 || cpu >= MOST_CPUS) return PyErr_Format(PyExc_ValueError, "there is no CPU %ld", cpu);
        if (cpu > most) most = cpu;
    }
    cpu_set_t *cpus = most < 0 ? NULL : CPU_ALLOC(most + 1);
    if (most >= 0 && !cpus) return PyErr_NoMemory();
    const size_t bytes = most < 0 ? 0 : CPU_ALLOC_SIZE(most + 1);
    if (cpus) CPU_ZERO_S(bytes, cpus);
    for (Py_ssize_t i = 0; i < count; i++) CPU_SET_S((size_t)PyLong_AsLong(PyList_GetItem(given, i)), bytes, cpus);
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&pool->lock);
    drop_cpus(pool);
    pool->cpus = cpus;
    pool->cpus_bytes = bytes;
    pthread_mutex_unlock(&pool->lock);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *pool_stop(PyObject *self, PyObject *nothing) {
    (void)nothing;
    Py_BEGIN_ALLOW_THREADS
    stop((Pool *)self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* One request of a (file, offset, buffer) tuple; -1 with an exception if it is none. */
static int take_request(Request *request, PyObject *given, bool writing) {
    long long offset;
    PyObject *memory;
    if (!PyTuple_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "a request is a tuple of file, offset and buffer");
        return -1;
    }
    if (!PyArg_ParseTuple(given, "iLO", &request->file, &offset, &memory)) return -1;
    request->offset = offset;
    return PyObject_GetBuffer(memory, &request->memory, writing ? PyBUF_SIMPLE : PyBUF_WRITABLE);
}

static PyObject *pool_begin(PyObject *self, PyObject *arguments) {
    Pool *pool = (Pool *)self;
    PyObject *given, *owner = NULL;
    int writing, helping, at_once = 0;
    unsigned long long then = 0, context = 0;
    if (!PyArg_ParseTuple(arguments, "O!pp|KKOi", &PyList_Type, &given, &writing, &helping, &then, &context, &owner, &at_once)) return NULL;
    if ((then || owner) && !(then && owner && at_once >= 1)) {
        return PyErr_Format(PyExc_ValueError, "a function at %llu, %d at once; expected an address and 1 or more", then, at_once);
    }
    Batch *batch = (Batch *)PyType_GenericAlloc(batch_type, 0);
    if (!batch) return NULL;
    batch->then = (Then *)(uintptr_t)then;
    batch->context = (void *)(uintptr_t)context;
    batch->owner = owner;
    Py_XINCREF(owner);
    batch->at_once = at_once;
    PyObject *const taken = PyList_AsTuple(given); /* which stays as it is while numbers and buffers are asked what they are */
    const Py_ssize_t count = taken ? PyTuple_Size(taken) : 0;
    batch->requests = PyMem_Calloc((size_t)count + 1, sizeof(Request));
    batch->order = PyMem_Calloc((size_t)count + 1, sizeof(Py_ssize_t));
    bool failed = !taken || !batch->requests || !batch->order;
    if (failed) PyErr_NoMemory();
    for (; !failed && batch->count < count; batch->count++) {
        batch->requests[batch->count].batch = batch;
        failed = take_request(&batch->requests[batch->count], PyTuple_GetItem(taken, batch->count), writing);
    }
    Py_XDECREF(taken);
    if (failed || pthread_cond_init(&batch->progress, NULL)) {
        Py_DECREF((PyObject *)batch);
        return failed ? NULL : PyErr_NoMemory();
    }
    batch->pool = pool;
    Py_INCREF(self);
    batch->writing = writing;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&pool->lock);
    const Py_ssize_t wanted = (count < pool->depth ? count : pool->depth) - helping;
    if (!pool->stopped) start_threads(pool, wanted);
    batch->helping = helping || !pool->started;
    if (count) enter_ring(pool, batch);
    const bool all = wanted >= pool->started;
    pthread_mutex_unlock(&pool->lock); /* before they are woken, or they would wait for it */
    if (all) pthread_cond_broadcast(&pool->wake);
    else for (Py_ssize_t i = 0; i < wanted; i++) pthread_cond_signal(&pool->wake);
    Py_END_ALLOW_THREADS
    return (PyObject *)batch;
}

static PyMethodDef pool_methods[] = {
    {"begin", pool_begin, METH_VARARGS, NULL},
    {"keep_on", pool_keep_on, METH_O, NULL},
    {"stop", pool_stop, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pool_slots[] = {{Py_tp_new, pool_new}, {Py_tp_dealloc, pool_free}, {Py_tp_methods, pool_methods}, {0, NULL}};
static PyType_Spec pool_spec = {"kvtier.io._requests.Pool", sizeof(Pool), 0, Py_TPFLAGS_DEFAULT, pool_slots};

static int prepare(PyObject *module) {
    if (!batch_type) batch_type = (PyTypeObject *)PyType_FromSpec(&batch_spec);
    PyObject *type = batch_type ? PyType_FromSpec(&pool_spec) : NULL;
    const int failed = !type || PyModule_AddObjectRef(module, "Pool", type);
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_requests", "Batches of file requests.", 0, NULL, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__requests(void) { return PyModuleDef_Init(&definition); }
