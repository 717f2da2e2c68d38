/* Rows for pages that follow each other: `add_chain`, and with their copies `settle_chain`. See table.h. */
#include "table.h"

enum { KEY_NAME_BYTES = 32 }; /* about so far into a bytes object its first byte is */

static void wake(Table *table, int64_t row, PyObject *key, PyObject *parent_key) {
    table->used[row] = 1;
    table->uses[row] = 0;
    table->pin_until[row] = -INFINITY;
    table->attention[row] = NAN;
    table->prefetched_from[row] = -1;
    set_object(&table->key[row], key);
    set_object(&table->parent_key[row], parent_key);
}

static bool has_room(const Table *table, int64_t wanted) {
    return has_sound_counts(table) && wanted - table->counts[UNUSED] <= table->rows - table->counts[SIZE];
}

/* Whether the last of the free list, as many as will be taken, are rows; false with an exception if not. */
static bool are_free_rows(const Table *table, int64_t wanted) {
    const int64_t unused = table->counts[UNUSED];
    for (int64_t i = wanted < unused ? unused - wanted : 0; i < unused; i++) {
        if ((uint64_t)table->free[i] < (uint64_t)table->rows) continue;
        PyErr_SetString(PyExc_ValueError, "the free list names what is no row of the table");
        return false;
    }
    return true;
}

/* Into `rows` from rows[first] on: the rows that the keys from keys[first] on will have. */
static void find_free(const Table *table, Py_ssize_t first, const Rows *rows) {
    const int64_t unused = table->counts[UNUSED], size = table->counts[SIZE];
    for (Py_ssize_t i = first; i < rows->count; i++) {
        const int64_t others = i - first;
        *row_at(rows, i) = others < unused ? table->free[unused - 1 - others] : size + others - unused;
    }
}

/* Those rows are in use: the last of the free list, then fresh ones. */
static void take(Table *table, int64_t count) {
    const int64_t fresh = count - table->counts[UNUSED];
    table->counts[UNUSED] = fresh < 0 ? -fresh : 0;
    if (fresh > 0) table->counts[SIZE] += fresh;
}

/* The keys from keys[first] on, and before keys[until], do not lead to rows any more. */
static void withdraw(Chain *chain, Py_ssize_t first, Py_ssize_t until) {
    while (until > first) index_remove(chain->index, PyTuple_GetItem(chain->keys, --until));
}

/* The keys from keys[first] on lead to these rows. 1 if so; 0, and nothing done, if one leads to a row already; -1 with an exception. */
static int enter(Chain *chain, Py_ssize_t first, const Rows *rows) {
    Batch batch;
    int entered = index_make_room(chain->index, rows->count - first) ? 1 : -1;
    Py_ssize_t i = first;
    for (; entered == 1 && i < rows->count; i += entered == 1) {
        const Py_ssize_t place = (i - first) % BATCH;
        if (!place && !index_batch(chain->index, chain->keys, i, &batch)) entered = -1;
        else if (!index_add(chain->index, batch.keys[place], batch.tags[place], *row_at(rows, i))) entered = 0;
    }
    if (entered < 1) withdraw(chain, first, i);
    return entered;
}

/* These rows, from rows[first] on, are in use: those of the keys, one after the other. */
static void link_rows(Table *table, Chain *chain, const Rows *rows, Py_ssize_t first) {
    for (Py_ssize_t i = first; i < rows->count; i++) {
        PyObject *key = PyTuple_GetItem(chain->keys, i);
        const int64_t row = *row_at(rows, i);
        wake(table, row, key, chain->before);
        table->depth[row] = chain->depth++;
        table->parent[row] = chain->parent;
        const Py_ssize_t above = cell(table, chain->parent);
        table->children[above] = i == first ? table->children[above] + 1 : 1;
        chain->parent = row;
        chain->before = key;
    }
    take(table, rows->count - first);
}

/* As add_chain with its arguments opened: how many keys were known, -1 if anything is unusual, -2 with an exception. */
static Py_ssize_t extend(Table *table, Chain *chain, const Rows *rows) {
    const Py_ssize_t first = walk(table, chain->index, chain->keys, rows, false), count = rows->count;
    if (first < 0) return -2;
    for (Py_ssize_t i = 0; i < first; i++) {
        if (table->parent[*row_at(rows, i)] == NO_ROW) return -1;
    }
    if (first == count) return first;
    if (first) {
        chain->before = PyTuple_GetItem(chain->keys, first - 1);
        chain->depth += first;
        chain->parent = *row_at(rows, first - 1);
    }
    if ((!first && chain->depth > 0 && chain->parent == NO_ROW) || !has_room(table, count - first)) return -1;
    if (!are_free_rows(table, count - first)) return -2;
    find_free(table, first, rows);
    const int entered = enter(chain, first, rows);
    if (entered < 1) return entered < 0 ? -2 : -1;
    link_rows(table, chain, rows, first);
    return first;
}

bool chain_open(Chain *chain, PyObject *const *arguments) {
    bool failed = false;
    *chain = (Chain){.index = index_of(arguments[0]), .before = arguments[2]};
    chain->depth = number_of(arguments[3], &failed), chain->parent = number_of(arguments[4], &failed);
    if (chain->index && !failed) chain->keys = PySequence_Tuple(arguments[1]);
    return chain->keys;
}

void chain_close(Chain *chain) { Py_DECREF(chain->keys); }

PyObject *table_add_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("add_chain(row_of, keys, before, depth, parent, out)", given, 6)) return NULL;
    Chain chain;
    Rows out;
    if (!chain_open(&chain, arguments)) return NULL;
    Py_ssize_t known = -2;
    if (rows_open(&out, arguments[5], true)) {
        const Py_ssize_t count = item_count(chain.keys);
        if (count > out.count) PyErr_SetString(PyExc_ValueError, "less room for rows than there are keys");
        out.count = count < out.count ? count : out.count;
        if (!PyErr_Occurred()) known = extend((Table *)self, &chain, &out);
        rows_close(&out);
    }
    chain_close(&chain);
    return known == -2 ? NULL : PyLong_FromSsize_t(known);
}

PyObject *settling_open(Settling *settling, PyObject *const *arguments) {
    bool failed = false;
    *settling = (Settling){.tier = number_of(arguments[5], &failed)};
    if (failed || !chain_open(&settling->chain, arguments)) return NULL;
    PyObject *slots = sequence_open(arguments[6]);
    if (!slots) chain_close(&settling->chain);
    return slots;
}

void settling_close(Settling *settling, PyObject *slots) {
    Py_DECREF(slots);
    chain_close(&settling->chain);
}

int foresee(const Table *table, Settling *settling, PyObject *slots) {
    const Chain *chain = &settling->chain;
    const Py_ssize_t count = item_count(chain->keys);
    bool failed = false, usual = count && item_count(slots) == count && settling->rows.count == count;
    usual = usual && settling->parents.count == count && settling->depths.count == count && settling->slots.count == count;
    usual = usual && tier_within(table, settling->tier) && !(chain->depth > 0 && chain->parent == NO_ROW) && has_room(table, count);
    if (!usual) return 0;
    for (Py_ssize_t i = 0; !failed && i < count; i++) {
        const char *key = (const char *)PyTuple_GetItem(chain->keys, i);
        __builtin_prefetch(key); /* its hash; and what it is called, which may be in the next line of memory */
        __builtin_prefetch(key + KEY_NAME_BYTES);
        *row_at(&settling->slots, i) = number_of(item(slots, i), &failed);
    }
    if (failed || !are_free_rows(table, count)) return -1;
    find_free(table, 0, &settling->rows);
    for (Py_ssize_t i = 0; i < count; i++) {
        *row_at(&settling->parents, i) = i ? *row_at(&settling->rows, i - 1) : chain->parent;
        *row_at(&settling->depths, i) = chain->depth + i;
    }
    return 1;
}

int enter_keys(Settling *settling) { return enter(&settling->chain, 0, &settling->rows); }

void withdraw_keys(Settling *settling) { withdraw(&settling->chain, 0, settling->rows.count); }

void settle_entered(Table *table, Settling *settling) {
    const Rows *rows = &settling->rows;
    link_rows(table, &settling->chain, rows, 0);
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        table->slot[settling->tier * table->cells + row] = *row_at(&settling->slots, i);
        *state(table, row, settling->tier) = READY;
        table->leases[row]++;
        table->uses[row]++;
    }
}

PyObject *table_settle_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "settle_chain(row_of, keys, before, depth, parent, tier, slots, rows, parents, depths)";
    if (expect_arguments(method, given, 10)) return NULL;
    Settling settling;
    PyObject *slots = settling_open(&settling, arguments);
    if (!slots) return NULL;
    Rows *const out[] = {&settling.rows, &settling.parents, &settling.depths};
    int opened = 0;
    while (opened < 3 && rows_open(out[opened], arguments[7 + opened], true)) opened++;
    int done = -1;
    if (opened == 3 && rows_make(&settling.slots, settling.rows.count)) {
        done = foresee((Table *)self, &settling, slots);
        if (done == 1) done = enter_keys(&settling);
        if (done == 1) settle_entered((Table *)self, &settling);
        rows_free(&settling.slots);
    }
    while (opened > 0) rows_close(out[--opened]);
    settling_close(&settling, slots);
    return done < 0 ? NULL : PyBool_FromLong(done);
}
