/* The page table's loops: what `kvtier.pages` does with columns, one row after the other instead of one NumPy call after the other.

   A method that finds anything unusual answers False or None and has changed nothing: the same method in Python then does the work, or
   says what is wrong. Row numbers that columns hold are checked like those from outside; NO_ROW and all that is out of range means the
   last cell, which belongs to no row. */
#include "rows.h"

#include <string.h>

enum { ABSENT, WRITING, READY, MOST_TIERS = 8 };
static const uint64_t READY_ANYWHERE = 0x0202020202020202;

typedef struct {
    PyObject_HEAD
    int64_t *parent, *children, *depth, *fill, *leases, *uses, *prefetched_from, *slot, *readers, *free;
    double *pin_until, *attention;
    uint64_t *copies;
    uint8_t *used, *open;
    PyObject **key, **parent_key;
    Py_ssize_t cells, rows; /* rows is cells - 1: the last cell is nobody's */
    Py_ssize_t tiers;
    int held;
    Py_buffer columns[17];
} Table;

static void table_dealloc(PyObject *self) {
    Table *table = (Table *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (table->held > 0) PyBuffer_Release(&table->columns[--table->held]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void *hold_column(Table *table, PyObject *columns, Py_ssize_t size, Py_ssize_t cells) {
    Py_buffer *column = &table->columns[table->held];
    PyObject *array = PyTuple_GetItem(columns, table->held);
    if (!array) return NULL;
    const int failed = column_open(column, array, size, cells);
    if (column->obj) table->held++;
    return failed ? NULL : column->buf;
}

static bool hold_columns(Table *table, PyObject *columns) {
    if (!(table->parent = hold_column(table, columns, 8, -1))) return false;
    const Py_ssize_t cells = table->columns[0].len / 8;
    if (!(table->slot = hold_column(table, columns, 8, -1))) return false;
    if (cells) table->tiers = table->columns[1].len / 8 / cells;
    if (!cells || table->tiers < 1 || table->tiers > MOST_TIERS) {
        PyErr_SetString(PyExc_ValueError, "a table needs a cell that is nobody's, and 1 to 8 tiers");
        return false;
    }
    table->cells = cells;
    table->rows = cells - 1;
    return (table->readers = hold_column(table, columns, 8, table->tiers * cells)) && (table->children = hold_column(table, columns, 8, cells)) &&
           (table->depth = hold_column(table, columns, 8, cells)) && (table->fill = hold_column(table, columns, 8, cells)) &&
           (table->leases = hold_column(table, columns, 8, cells)) && (table->uses = hold_column(table, columns, 8, cells)) &&
           (table->prefetched_from = hold_column(table, columns, 8, cells)) && (table->pin_until = hold_column(table, columns, 8, cells)) &&
           (table->attention = hold_column(table, columns, 8, cells)) && (table->copies = hold_column(table, columns, 8, cells)) &&
           (table->used = hold_column(table, columns, 1, cells)) && (table->open = hold_column(table, columns, 1, cells)) &&
           (table->key = hold_column(table, columns, sizeof(PyObject *), cells)) &&
           (table->parent_key = hold_column(table, columns, sizeof(PyObject *), cells)) &&
           (table->free = hold_column(table, columns, 8, table->rows));
}

static PyObject *table_new(PyTypeObject *type, PyObject *columns, PyObject *named) {
    (void)named;
    Table *table = (Table *)PyType_GenericAlloc(type, 0);
    if (!table) return NULL;
    if (expect_arguments("Table", PyTuple_Size(columns), 17) || !hold_columns(table, columns)) {
        Py_DECREF(table);
        return NULL;
    }
    return (PyObject *)table;
}

static inline Py_ssize_t cell(const Table *table, int64_t row) { return (uint64_t)row < (uint64_t)table->rows ? row : table->rows; }

static inline uint8_t *state(const Table *table, int64_t row, int64_t tier) { return (uint8_t *)&table->copies[row] + tier; }

static void set_object(PyObject **place, PyObject *object) {
    PyObject *before = *place;
    Py_INCREF(object);
    *place = object;
    Py_XDECREF(before);
}

/* Keys were made, or last asked for, long ago: fetching this many ahead hides most of the wait for memory. */
enum { AHEAD = 6 };

static inline void fetch_ahead(PyObject *keys, Py_ssize_t index, Py_ssize_t count) {
    if (index + AHEAD < count) __builtin_prefetch(item(keys, index + AHEAD));
}

/* The row of `key`, NO_ROW if there is none; `*failed` set if looking failed. */
static int64_t row_of(PyObject *index, PyObject *key, bool *failed) {
    PyObject *row = key ? PyDict_GetItemWithError(index, key) : NULL;
    if (row) return number_of(row, failed);
    if (PyErr_Occurred()) *failed = true;
    return NO_ROW;
}

/* -- finding -- */

/* Rows of keys[i] into out[i] up to the first without a row, or (`visible`) without a READY copy. How many; -1 with an exception. */
static Py_ssize_t walk(const Table *table, PyObject *index, PyObject *keys, const Rows *out, bool visible) {
    const Py_ssize_t count = item_count(keys);
    if (count < 0) return -1;
    if (out->count < count) {
        PyErr_SetString(PyExc_ValueError, "less room for rows than there are keys");
        return -1;
    }
    bool failed = false;
    for (Py_ssize_t i = 0; i < count; i++) {
        fetch_ahead(keys, i, count);
        const int64_t row = row_of(index, item(keys, i), &failed);
        if (failed) return -1;
        if ((uint64_t)row >= (uint64_t)table->rows || (visible && !(table->copies[row] & READY_ANYWHERE))) return i;
        *row_at(out, i) = row;
    }
    return count;
}

static PyObject *find(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    Rows out;
    if (expect_arguments("find(row_of, keys, out)", given, 3) || !rows_open(&out, arguments[2], true)) return NULL;
    const Py_ssize_t found = walk((Table *)self, arguments[0], arguments[1], &out, true);
    rows_close(&out);
    return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

static PyObject *claim(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    Rows out;
    if (expect_arguments("claim(row_of, keys, out)", given, 3) || !rows_open(&out, arguments[2], true)) return NULL;
    Table *table = (Table *)self;
    const Py_ssize_t found = walk(table, arguments[0], arguments[1], &out, true);
    for (Py_ssize_t i = 0; i < found; i++) {
        table->leases[*row_at(&out, i)]++;
        table->uses[*row_at(&out, i)]++;
    }
    rows_close(&out);
    return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

static PyObject *links(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("links(rows, parents, depths)", given, 3)) return NULL;
    const Table *table = (Table *)self;
    Rows rows[3];
    int opened = 0;
    while (opened < 3 && rows_open(&rows[opened], arguments[opened], opened > 0)) opened++;
    const Py_ssize_t count = opened ? rows[0].count : 0;
    const bool usual = opened == 3 && rows[1].count == count && rows[2].count == count && rows_within(&rows[0], table->rows);
    bool attended = false;
    for (Py_ssize_t i = 0; usual && i < count; i++) {
        const int64_t row = *row_at(&rows[0], i);
        *row_at(&rows[1], i) = table->parent[row];
        *row_at(&rows[2], i) = table->depth[row];
        attended |= !isnan(table->attention[row]);
    }
    for (int i = 0; i < opened; i++) rows_close(&rows[i]);
    return opened < 3 ? NULL : PyLong_FromLong(usual ? attended : -1);
}

/* What pages are called: the first 8 bytes of their keys. */
static PyObject *names(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("names(rows, out)", given, 2)) return NULL;
    const Table *table = (Table *)self;
    Rows rows, out;
    if (!rows_open(&rows, arguments[0], false)) return NULL;
    if (!rows_open(&out, arguments[1], true)) {
        rows_close(&rows);
        return NULL;
    }
    bool usual = rows_within(&rows, table->rows) && out.count == rows.count;
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        PyObject *key = table->key[*row_at(&rows, i)];
        usual = key && PyBytes_Check(key) && PyBytes_Size(key) >= 8;
        if (usual) memcpy(row_at(&out, i), PyBytes_AsString(key), 8);
    }
    rows_close(&out);
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

/* -- rows -- */

static void wake(Table *table, int64_t row, PyObject *key, PyObject *parent_key) {
    table->used[row] = 1;
    table->uses[row] = 0;
    table->pin_until[row] = -INFINITY;
    table->attention[row] = NAN;
    table->prefetched_from[row] = -1;
    set_object(&table->key[row], key);
    set_object(&table->parent_key[row], parent_key);
}

/* How many of the first keys have a row, which goes into `out`; NO_ROW if one of those has no parent, or another key has a row, too. */
static Py_ssize_t known(const Table *table, PyObject *index, PyObject *keys, const Rows *out, bool *failed) {
    const Py_ssize_t first = walk(table, index, keys, out, false), count = item_count(keys);
    *failed = first < 0;
    bool usual = !*failed;
    for (Py_ssize_t i = 0; usual && i < first; i++) usual = table->parent[*row_at(out, i)] != NO_ROW;
    for (Py_ssize_t i = first; usual && i < count; i++) {
        fetch_ahead(keys, i, count);
        usual = row_of(index, item(keys, i), failed) == NO_ROW && !*failed;
    }
    return usual ? first : NO_ROW;
}

/* Rows that follow each other, and where to find free ones: `unused` on the free list, then from `size` up. */
typedef struct {
    PyObject *index, *keys, *before;
    int64_t depth, parent, fill, size, unused;
} Chain;

static bool has_room(const Table *table, const Chain *chain, int64_t wanted) {
    const int64_t fresh = wanted > chain->unused ? wanted - chain->unused : 0;
    return chain->unused >= 0 && chain->unused <= table->rows && chain->size >= 0 && chain->size <= table->rows &&
           fresh <= table->rows - chain->size;
}

/* Whether the last of the free list, as many as will be taken, are rows; false with an exception if not. */
static bool are_free_rows(const Table *table, const Chain *chain, int64_t wanted) {
    for (int64_t i = wanted < chain->unused ? chain->unused - wanted : 0; i < chain->unused; i++) {
        if ((uint64_t)table->free[i] < (uint64_t)table->rows) continue;
        PyErr_SetString(PyExc_ValueError, "the free list names what is no row of the table");
        return false;
    }
    return true;
}

/* A row for this key, after the one before. -1 with an exception. */
static int append(Table *table, Chain *chain, PyObject *key, bool first) {
    const int64_t row = chain->unused > 0 ? table->free[--chain->unused] : chain->size++;
    PyObject *number = PyLong_FromLongLong(row);
    const int failed = !number || PyDict_SetItem(chain->index, key, number);
    Py_XDECREF(number);
    if (failed) return -1;
    wake(table, row, key, chain->before);
    table->fill[row] = chain->fill;
    table->depth[row] = chain->depth++;
    table->parent[row] = chain->parent;
    const Py_ssize_t above = cell(table, chain->parent);
    table->children[above] = first ? table->children[above] + 1 : 1;
    chain->parent = row;
    chain->before = key;
    return 0;
}

/* As add_chain with its arguments opened: how many keys were known, -1 if anything is unusual, -2 with an exception. */
static Py_ssize_t extend(Table *table, Chain *chain, const Rows *out) {
    bool failed = false;
    const Py_ssize_t count = item_count(chain->keys), first = known(table, chain->index, chain->keys, out, &failed);
    if (failed) return -2;
    if (first < 0 || first == count) return first;
    if (first) {
        chain->before = item(chain->keys, first - 1);
        chain->depth += first;
        chain->parent = *row_at(out, first - 1);
    }
    if ((!first && chain->depth > 0 && chain->parent == NO_ROW) || !has_room(table, chain, count - first)) return -1;
    if (!are_free_rows(table, chain, count - first)) return -2;
    for (Py_ssize_t i = first; i < count; i++) {
        if (append(table, chain, item(chain->keys, i), i == first)) return -2;
        *row_at(out, i) = chain->parent;
    }
    return first;
}

/* The arguments from row_of to free_count. */
static Chain chain_of(PyObject *const *arguments, bool *failed) {
    Chain chain = {.index = arguments[0], .keys = arguments[1], .before = arguments[2]};
    chain.depth = number_of(arguments[3], failed), chain.parent = number_of(arguments[4], failed);
    chain.fill = number_of(arguments[5], failed), chain.size = number_of(arguments[6], failed);
    chain.unused = number_of(arguments[7], failed);
    return chain;
}

static PyObject *add_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("add_chain(row_of, keys, before, depth, parent, fill, size, free_count, out)", given, 9)) return NULL;
    bool failed = false;
    Chain chain = chain_of(arguments, &failed);
    Rows out;
    if (failed || !rows_open(&out, arguments[8], true)) return NULL;
    const Py_ssize_t known_keys = extend((Table *)self, &chain, &out);
    rows_close(&out);
    return known_keys == -2 ? NULL : PyLong_FromSsize_t(known_keys);
}

/* As `extend` and `settle` where no key is known; parents, depths and, to begin with, the slots go into the other columns. 1 if so, 0 and
   nothing done if not, -1 with an exception. */
static int settle_new(Table *table, Chain *chain, int64_t tier, PyObject *slots, const Rows *rows, const Rows *parents, const Rows *depths) {
    const Py_ssize_t count = item_count(chain->keys);
    if (count < 0 || item_count(slots) < 0) return -1;
    const int64_t parent = chain->parent, depth = chain->depth;
    bool failed = false;
    bool usual = count && item_count(slots) == count && rows->count == count && parents->count == count && depths->count == count;
    usual = usual && tier >= 0 && tier < table->tiers && !(depth > 0 && parent == NO_ROW) && has_room(table, chain, count);
    for (Py_ssize_t i = 0; usual && i < count; i++) {
        fetch_ahead(chain->keys, i, count);
        usual = row_of(chain->index, item(chain->keys, i), &failed) == NO_ROW && !failed;
    }
    for (Py_ssize_t i = 0; usual && !failed && i < count; i++) *row_at(depths, i) = number_of(item(slots, i), &failed);
    if (failed || (usual && !are_free_rows(table, chain, count))) return -1;
    for (Py_ssize_t i = 0; usual && i < count; i++) {
        *row_at(parents, i) = chain->parent;
        if (append(table, chain, item(chain->keys, i), !i)) return -1;
        const int64_t row = *row_at(rows, i) = chain->parent;
        table->slot[tier * table->cells + row] = *row_at(depths, i);
        *row_at(depths, i) = depth + i;
        *((uint8_t *)&table->copies[row] + tier) = READY;
        table->leases[row]++;
        table->uses[row]++;
    }
    return usual;
}

static PyObject *settle_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "settle_chain(row_of, keys, before, depth, parent, fill, size, free_count, tier, slots, rows, parents, depths)";
    if (expect_arguments(method, given, 13)) return NULL;
    bool failed = false;
    Chain chain = chain_of(arguments, &failed);
    const int64_t tier = number_of(arguments[8], &failed);
    Rows out[3];
    int opened = 0;
    while (!failed && opened < 3 && rows_open(&out[opened], arguments[10 + opened], true)) opened++;
    const int done = opened < 3 ? -1 : settle_new((Table *)self, &chain, tier, arguments[9], &out[0], &out[1], &out[2]);
    while (opened > 0) rows_close(&out[--opened]);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

/* What goes while rows are given up. */
typedef struct {
    Table *table;
    PyObject *index;
    int64_t unused;
    bool hollow, failed;
} Burial;

static void bury(Burial *burial, int64_t row) {
    Table *table = burial->table;
    if (table->key[row] && table->key[row] != Py_None && PyDict_DelItem(burial->index, table->key[row])) burial->failed = true;
    set_object(&table->key[row], Py_None);
    table->used[row] = table->open[row] = 0;
    if (burial->unused < table->rows) table->free[burial->unused++] = row;
}

static inline bool is_empty(const Table *table, int64_t row) { return !table->copies[row] && !table->leases[row]; }

static void reap_up(Burial *burial, int64_t row) {
    Table *table = burial->table;
    for (;;) {
        const Py_ssize_t here = cell(table, row);
        if (!table->used[here] || !is_empty(table, here) || table->children[here]) return;
        row = table->parent[here];
        table->children[cell(table, row)]--;
        bury(burial, here);
        table->parent[here] = NO_ROW;
    }
}

/* As `_reap` in Python, in the same order. */
static void reap(Burial *burial, const Rows *rows) {
    Table *table = burial->table;
    bool parents = false;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        table->children[cell(table, table->parent[row])]--;
        __builtin_prefetch(table->key[row]);
    }
    for (Py_ssize_t i = 0; i < rows->count; i++) parents |= is_empty(table, *row_at(rows, i)) && table->children[*row_at(rows, i)];
    if (parents) {
        for (Py_ssize_t i = 0; i < rows->count; i++) {
            const int64_t row = *row_at(rows, i);
            if (is_empty(table, row)) table->children[cell(table, table->parent[row])]++;
        }
        for (Py_ssize_t i = 0; i < rows->count; i++) reap_up(burial, *row_at(rows, i));
        burial->hollow = true;
        return;
    }
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (is_empty(table, row) && table->used[row]) bury(burial, row);
    }
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        const int64_t parent = table->parent[row];
        table->parent[row] = NO_ROW;
        reap_up(burial, parent);
    }
}

static PyObject *buried(const Burial *burial) {
    return burial->failed ? NULL : Py_BuildValue("(LN)", (long long)burial->unused, PyBool_FromLong(burial->hollow));
}

/* -- copies -- */

static bool tier_within(const Table *table, int64_t tier) { return tier >= 0 && tier < table->tiers; }

/* As begin; `settled` also makes the copies READY, leased and used once more. */
static PyObject *place(Table *table, PyObject *const *arguments, bool settled) {
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    const Py_ssize_t count = item_count(arguments[2]);
    Rows rows;
    if (failed || count < 0 || !rows_open(&rows, arguments[0], false)) return NULL;
    bool usual = count == rows.count && tier_within(table, tier) && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < count; i++) usual = *state(table, *row_at(&rows, i), tier) == ABSENT;
    /* Slots are written first: they mean nothing while a copy is absent, should one of them be no number. */
    for (Py_ssize_t i = 0; usual && !failed && i < count; i++) {
        table->slot[tier * table->cells + *row_at(&rows, i)] = number_of(item(arguments[2], i), &failed);
    }
    for (Py_ssize_t i = 0; usual && !failed && i < count; i++) {
        const int64_t row = *row_at(&rows, i);
        *state(table, row, tier) = settled ? READY : WRITING;
        table->leases[row] += settled;
        table->uses[row] += settled;
    }
    rows_close(&rows);
    return failed ? NULL : PyBool_FromLong(usual);
}

static PyObject *begin(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("begin(rows, tier, slots)", given, 3) ? NULL : place((Table *)self, arguments, false);
}

static PyObject *settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("settle(rows, tier, slots)", given, 3) ? NULL : place((Table *)self, arguments, true);
}

static PyObject *commit(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("commit(rows, tier)", given, 2)) return NULL;
    Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Rows rows;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    bool usual = tier_within(table, tier) && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) usual = *state(table, *row_at(&rows, i), tier) == WRITING;
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) *state(table, *row_at(&rows, i), tier) = READY;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

static PyObject *drop_rows(Burial *burial, const Rows *rows, int64_t tier) {
    Table *table = burial->table;
    const int64_t *readers = table->readers + tier * table->cells, *slot = table->slot + tier * table->cells;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (*state(table, row, tier) == ABSENT || readers[row]) Py_RETURN_NONE;
    }
    PyObject *slots = PyList_New(rows->count);
    if (!slots) return NULL;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        PyObject *number = PyLong_FromLongLong(slot[*row_at(rows, i)]);
        if (!number || PyList_SetItem(slots, i, number)) {
            Py_DECREF(slots);
            return NULL;
        }
    }
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        *state(table, row, tier) = ABSENT;
        burial->hollow |= !table->copies[row] && table->leases[row];
    }
    reap(burial, rows);
    if (burial->failed) {
        Py_DECREF(slots);
        return NULL;
    }
    return Py_BuildValue("(NLN)", slots, (long long)burial->unused, PyBool_FromLong(burial->hollow));
}

static PyObject *drop(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("drop(rows, tier, row_of, free_count)", given, 4)) return NULL;
    Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Burial burial = {table, arguments[2], number_of(arguments[3], &failed), false, false};
    Rows rows;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    PyObject *answer = Py_None;
    if (tier_within(table, tier) && rows_within(&rows, table->rows) && burial.unused >= 0) {
        answer = drop_rows(&burial, &rows, tier);
    } else {
        Py_INCREF(answer);
    }
    rows_close(&rows);
    return answer;
}

/* -- holders -- */

static PyObject *lease(PyObject *self, PyObject *array) {
    Table *table = (Table *)self;
    Rows rows;
    if (!rows_open(&rows, array, false)) return NULL;
    const bool usual = rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) table->leases[*row_at(&rows, i)]++;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

static PyObject *use(PyObject *self, PyObject *array) {
    Table *table = (Table *)self;
    Rows rows;
    if (!rows_open(&rows, array, false)) return NULL;
    const bool usual = rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) table->uses[*row_at(&rows, i)]++;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

static PyObject *release(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("release(rows, row_of, free_count)", given, 3)) return NULL;
    Table *table = (Table *)self;
    bool failed = false;
    Burial burial = {table, arguments[1], number_of(arguments[2], &failed), false, false};
    Rows rows;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    bool usual = rows_within(&rows, table->rows) && burial.unused >= 0, left = false;
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        const int64_t row = *row_at(&rows, i);
        usual = table->leases[row] > 0 && !table->open[row];
    }
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        const int64_t row = *row_at(&rows, i);
        table->leases[row]--;
        left |= is_empty(table, row);
    }
    if (usual && left) reap(&burial, &rows);
    rows_close(&rows);
    if (usual) return buried(&burial);
    Py_RETURN_NONE;
}

static PyObject *protect(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("protect(rows, tier, out)", given, 3)) return NULL;
    const Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Rows rows;
    Py_buffer out;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    if (PyObject_GetBuffer(arguments[2], &out, PyBUF_WRITABLE)) {
        rows_close(&rows);
        return NULL;
    }
    const bool usual = tier_within(table, tier) && out.len == rows.count && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        const int64_t row = *row_at(&rows, i);
        const bool holds = table->leases[row] && !(tier && *state(table, row, 0) == READY);
        ((uint8_t *)out.buf)[i] = holds || table->readers[tier * table->cells + row];
    }
    PyBuffer_Release(&out);
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

static PyMethodDef methods[] = {
    {"find", FAST(find), NULL},       {"names", FAST(names), NULL},     {"add_chain", FAST(add_chain), NULL},
    {"begin", FAST(begin), NULL},     {"commit", FAST(commit), NULL},   {"drop", FAST(drop), NULL},
    {"lease", lease, METH_O, NULL},   {"use", use, METH_O, NULL},       {"release", FAST(release), NULL},
    {"protect", FAST(protect), NULL}, {"settle", FAST(settle), NULL},   {"links", FAST(links), NULL},
    {"claim", FAST(claim), NULL},     {"settle_chain", FAST(settle_chain), NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec table_spec = {"kvtier.columns._loops.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT, slots};
