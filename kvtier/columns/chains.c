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

/* Into `rows` from rows[first] on: the rows that the keys from keys[first] on will have. */
static void find_free(const Table *table, const Chain *chain, Py_ssize_t first, const Rows *rows) {
    for (Py_ssize_t i = first; i < rows->count; i++) {
        const int64_t others = i - first;
        *row_at(rows, i) = others < chain->unused ? table->free[chain->unused - 1 - others] : chain->size + others - chain->unused;
    }
}

/* The keys from keys[first] on, and before keys[until], do not lead to rows any more. */
static void withdraw(Chain *chain, Py_ssize_t first, Py_ssize_t until) {
    while (until > first) index_remove(chain->index, item(chain->keys, --until));
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

/* These rows, from rows[first] on, are those of the keys, one after the other. */
static void link_rows(Table *table, Chain *chain, const Rows *rows, Py_ssize_t first) {
    for (Py_ssize_t i = first; i < rows->count; i++) {
        PyObject *key = item(chain->keys, i);
        const int64_t row = *row_at(rows, i);
        wake(table, row, key, chain->before);
        table->fill[row] = chain->fill;
        table->depth[row] = chain->depth++;
        table->parent[row] = chain->parent;
        const Py_ssize_t above = cell(table, chain->parent);
        table->children[above] = i == first ? table->children[above] + 1 : 1;
        chain->parent = row;
        chain->before = key;
    }
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
        chain->before = item(chain->keys, first - 1);
        chain->depth += first;
        chain->parent = *row_at(rows, first - 1);
    }
    if ((!first && chain->depth > 0 && chain->parent == NO_ROW) || !has_room(table, chain, count - first)) return -1;
    if (!are_free_rows(table, chain, count - first)) return -2;
    find_free(table, chain, first, rows);
    const int entered = enter(chain, first, rows);
    if (entered < 1) return entered < 0 ? -2 : -1;
    link_rows(table, chain, rows, first);
    return first;
}

Chain chain_of(PyObject *const *arguments, bool *failed) {
    Chain chain = {.index = index_of(arguments[0]), .keys = arguments[1], .before = arguments[2]};
    chain.depth = number_of(arguments[3], failed), chain.parent = number_of(arguments[4], failed);
    chain.fill = number_of(arguments[5], failed), chain.size = number_of(arguments[6], failed);
    chain.unused = number_of(arguments[7], failed);
    *failed |= !chain.index;
    return chain;
}

PyObject *table_add_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("add_chain(row_of, keys, before, depth, parent, fill, size, free_count, out)", given, 9)) return NULL;
    bool failed = false;
    Chain chain = chain_of(arguments, &failed);
    Rows out;
    if (failed || !rows_open(&out, arguments[8], true)) return NULL;
    const Py_ssize_t count = item_count(chain.keys);
    if (count > out.count) PyErr_SetString(PyExc_ValueError, "less room for rows than there are keys");
    out.count = count;
    const Py_ssize_t known = PyErr_Occurred() ? -2 : extend((Table *)self, &chain, &out);
    rows_close(&out);
    return known == -2 ? NULL : PyLong_FromSsize_t(known);
}

int foresee(const Table *table, Settling *settling, PyObject *slots) {
    const Chain *chain = &settling->chain;
    const Py_ssize_t count = item_count(chain->keys);
    if (count < 0 || item_count(slots) < 0) return -1;
    bool failed = false, usual = count && item_count(slots) == count && settling->rows.count == count;
    usual = usual && settling->parents.count == count && settling->depths.count == count && settling->slots.count == count;
    usual = usual && tier_within(table, settling->tier) && !(chain->depth > 0 && chain->parent == NO_ROW) && has_room(table, chain, count);
    if (!usual) return 0;
    for (Py_ssize_t i = 0; !failed && i < count; i++) *row_at(&settling->slots, i) = number_of(item(slots, i), &failed);
    if (failed || !are_free_rows(table, chain, count)) return -1;
    find_free(table, chain, 0, &settling->rows);
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
    const char *method = "settle_chain(row_of, keys, before, depth, parent, fill, size, free_count, tier, slots, rows, parents, depths)";
    if (expect_arguments(method, given, 13)) return NULL;
    bool failed = false;
    Settling settling = {.chain = chain_of(arguments, &failed)};
    settling.tier = number_of(arguments[8], &failed);
    Rows *const out[] = {&settling.rows, &settling.parents, &settling.depths};
    int opened = 0;
    while (!failed && opened < 3 && rows_open(out[opened], arguments[10 + opened], true)) opened++;
    int done = -1;
    if (opened == 3 && rows_make(&settling.slots, settling.rows.count)) {
        done = foresee((Table *)self, &settling, arguments[9]);
        if (done == 1) done = enter_keys(&settling);
        if (done == 1) settle_entered((Table *)self, &settling);
        rows_free(&settling.slots);
    }
    while (opened > 0) rows_close(out[--opened]);
    return done < 0 ? NULL : PyBool_FromLong(done);
}
