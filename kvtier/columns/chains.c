/* Rows for pages that follow each other: `add_chain`, and with their copies `settle_chain`. See table.h. */
#include "table.h"

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

PyObject *table_add_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
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

PyObject *table_settle_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
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
