/* Rows by page key, see index.h: open addressing, a key not far after its first place, nothing left behind where one goes. The places come
   from the hash that bytes have in Python, which nobody outside can foresee. */
#include "index.h"

#include <string.h>

enum { FEWEST_BITS = 10, MOST_BITS = 31 };

static void index_dealloc(PyObject *self) {
    Index *index = (Index *)self;
    PyTypeObject *type = Py_TYPE(self);
    for (size_t place = 0; index->entries && place < (size_t)1 << index->bits; place++) Py_XDECREF(index->entries[place].key);
    PyMem_Free(index->entries);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

Index *index_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)index_dealloc) return (Index *)object;
    PyErr_Format(PyExc_TypeError, "%R where an index was expected", (PyObject *)Py_TYPE(object));
    return NULL;
}

static PyObject *index_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    (void)named;
    if (expect_arguments("Index()", PyTuple_Size(arguments), 0)) return NULL;
    Index *index = (Index *)PyType_GenericAlloc(type, 0);
    if (!index) return NULL;
    index->bits = FEWEST_BITS;
    index->entries = PyMem_Calloc((size_t)1 << FEWEST_BITS, sizeof *index->entries);
    if (index->entries) return (PyObject *)index;
    Py_DECREF(index);
    return PyErr_NoMemory();
}

/* -- places -- */

static inline size_t last_place(const Index *index) { return ((size_t)1 << index->bits) - 1; }

static inline size_t first_place(const Index *index, uint32_t tag) { return tag >> (32 - index->bits); }

static bool tag_of(PyObject *key, uint32_t *tag) {
    if (!PyBytes_CheckExact(key)) {
        PyErr_Format(PyExc_TypeError, "%R where the key of a page was expected: bytes", (PyObject *)Py_TYPE(key));
        return false;
    }
    *tag = (uint32_t)((uint64_t)PyObject_Hash(key) * 0x9E3779B97F4A7C15u >> 32);
    return true;
}

bool index_batch(const Index *index, PyObject *keys, Py_ssize_t from, Batch *batch) {
    const Py_ssize_t left = item_count(keys) - from, count = left < BATCH ? left : BATCH;
    for (Py_ssize_t i = 0; i < count; i++) {
        batch->keys[i] = item(keys, from + i);
        __builtin_prefetch(batch->keys[i]); /* made, or last asked for, long ago */
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!tag_of(batch->keys[i], &batch->tags[i])) return false;
        __builtin_prefetch(&index->entries[first_place(index, batch->tags[i])]);
    }
    return true;
}

bool index_fetch(const Index *index, PyObject *key, uint32_t *tag) {
    if (!PyBytes_CheckExact(key) || !tag_of(key, tag)) return false;
    __builtin_prefetch(&index->entries[first_place(index, *tag)], 1);
    return true;
}

static bool are_equal(PyObject *one, PyObject *other) {
    if (one == other) return true;
    const Py_ssize_t size = PyBytes_Size(one);
    return size == PyBytes_Size(other) && !memcmp(PyBytes_AsString(one), PyBytes_AsString(other), (size_t)size);
}

/* Where a key is, or where it would go. */
static Entry *look_for(const Index *index, PyObject *key, uint32_t tag) {
    for (size_t place = first_place(index, tag);; place = (place + 1) & last_place(index)) {
        Entry *entry = &index->entries[place];
        if (!entry->key || (entry->tag == tag && are_equal(entry->key, key))) return entry;
    }
}

int64_t index_find(const Index *index, PyObject *key, uint32_t tag) {
    const Entry *entry = look_for(index, key, tag);
    return entry->key ? (int64_t)entry->row : NO_ROW;
}

/* -- coming and going -- */

bool index_make_room(Index *index, Py_ssize_t more) {
    unsigned bits = index->bits;
    while (bits <= MOST_BITS && (index->count + more) * 3 > (Py_ssize_t)2 << bits) bits++;
    if (bits == index->bits) return true;
    Entry *before = index->entries, *entries = bits <= MOST_BITS ? PyMem_Calloc((size_t)1 << bits, sizeof *entries) : NULL;
    if (!entries) {
        PyErr_NoMemory();
        return false;
    }
    const size_t places = (size_t)1 << index->bits;
    index->entries = entries;
    index->bits = bits;
    for (size_t place = 0; place < places; place++) {
        if (before[place].key) *look_for(index, before[place].key, before[place].tag) = before[place];
    }
    PyMem_Free(before);
    return true;
}

bool index_add(Index *index, PyObject *key, uint32_t tag, int64_t row) {
    Entry *entry = look_for(index, key, tag);
    if (entry->key) return false;
    Py_INCREF(key);
    *entry = (Entry){key, tag, (uint32_t)row};
    index->count++;
    return true;
}

/* Those after a gap that could be found no more move up. */
static void close_gap(Index *index, size_t gap) {
    const size_t last = last_place(index);
    for (size_t place = (gap + 1) & last; index->entries[place].key; place = (place + 1) & last) {
        const size_t first = first_place(index, index->entries[place].tag);
        if (((place - first) & last) < ((place - gap) & last)) continue;
        index->entries[gap] = index->entries[place];
        gap = place;
    }
    index->entries[gap].key = NULL;
}

bool index_remove(Index *index, PyObject *key) {
    uint32_t tag;
    return tag_of(key, &tag) && index_remove_tagged(index, key, tag);
}

bool index_remove_tagged(Index *index, PyObject *key, uint32_t tag) {
    Entry *entry = look_for(index, key, tag);
    if (!entry->key) {
        PyErr_SetObject(PyExc_KeyError, key);
        return false;
    }
    PyObject *held = entry->key;
    close_gap(index, (size_t)(entry - index->entries));
    index->count--;
    Py_DECREF(held);
    return true;
}

/* -- as a dict has it -- */

static Py_ssize_t length(PyObject *self) { return ((Index *)self)->count; }

static int contains(PyObject *self, PyObject *key) {
    uint32_t tag;
    return tag_of(key, &tag) ? index_find((Index *)self, key, tag) != NO_ROW : -1;
}

static PyObject *get(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint32_t tag;
    if ((given != 2 && expect_arguments("get(key) or get(key, default)", given, 1)) || !tag_of(arguments[0], &tag)) return NULL;
    const int64_t row = index_find((Index *)self, arguments[0], tag);
    if (row != NO_ROW) return PyLong_FromLongLong(row);
    PyObject *instead = given == 2 ? arguments[1] : Py_None;
    Py_INCREF(instead);
    return instead;
}

static int assign(PyObject *self, PyObject *key, PyObject *value) {
    Index *index = (Index *)self;
    if (!value) return index_remove(index, key) ? 0 : -1;
    uint32_t tag;
    bool failed = !tag_of(key, &tag);
    const int64_t row = failed ? 0 : number_of(value, &failed);
    if (!failed && (row < 0 || row >= MOST_ROWS)) {
        PyErr_Format(PyExc_OverflowError, "row %lld; expected 0 to below 2**32", (long long)row);
        return -1;
    }
    if (failed || !index_make_room(index, 1)) return -1;
    if (!index_add(index, key, tag, row)) look_for(index, key, tag)->row = (uint32_t)row;
    return 0;
}

static PyObject *items(PyObject *self, PyObject *ignored) {
    (void)ignored;
    const Index *index = (Index *)self;
    PyObject *pairs = PyList_New(0);
    for (size_t place = 0; pairs && place <= last_place(index); place++) {
        const Entry entry = index->entries[place]; /* its own, and the key held: new objects may set off the garbage collector, that anything */
        Py_XINCREF(entry.key);
        PyObject *pair = entry.key ? Py_BuildValue("(NL)", entry.key, (long long)entry.row) : NULL;
        if (entry.key && (!pair || PyList_Append(pairs, pair))) Py_CLEAR(pairs);
        Py_XDECREF(pair);
    }
    return pairs;
}

static PyMethodDef methods[] = {{"get", FAST(get), NULL}, {"items", items, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};

static PyType_Slot slots[] = {
    {Py_tp_new, index_new},
    {Py_tp_dealloc, index_dealloc},
    {Py_tp_methods, methods},
    {Py_mp_length, length},
    {Py_mp_ass_subscript, assign},
    {Py_sq_contains, contains},
    {0, NULL},
};

PyType_Spec index_spec = {"kvtier.columns._loops.Index", sizeof(Index), 0, Py_TPFLAGS_DEFAULT, slots};
