/* Rows of which nothing is left go, and with them the hollow ones before that only they kept. See table.h. */
#include "table.h"

static bool has_key(const Table *table, int64_t row) { return table->key[row] && table->key[row] != Py_None; }

/* A row is on the free list from now on; its key leads nowhere. Its parent's key is let go of now, and not when the row is used again: that
   page mostly leaves next. */
static void give_up(Table *table, int64_t row) {
    set_object(&table->key[row], Py_None);
    set_object(&table->parent_key[row], Py_None);
    table->used[row] = table->open[row] = 0;
    if (table->counts[UNUSED] < table->rows) table->free[table->counts[UNUSED]++] = row;
}

static void bury(Burial *burial, int64_t row) {
    if (has_key(burial->table, row) && !index_remove(burial->index, burial->table->key[row])) burial->failed = true;
    give_up(burial->table, row);
}

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

/* Buries those of the rows from rows[from] on that are empty, up to BATCH of them: where their keys are looked for is fetched first. */
static void bury_batch(Burial *burial, const Rows *rows, Py_ssize_t from) {
    Table *table = burial->table;
    int64_t empty[BATCH];
    uint32_t tags[BATCH];
    bool fetched[BATCH];
    Py_ssize_t count = 0;
    for (Py_ssize_t i = from; i < rows->count && i < from + BATCH; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        fetched[count] = has_key(table, row) && index_fetch(burial->index, table->key[row], &tags[count]);
        empty[count++] = row;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!table->used[empty[i]]) continue; /* named twice */
        if (!fetched[i]) {
            bury(burial, empty[i]);
            continue;
        }
        if (!index_remove_tagged(burial->index, table->key[empty[i]], tags[i])) burial->failed = true;
        give_up(table, empty[i]);
    }
}

void reap(Burial *burial, const Rows *rows) {
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
        table->counts[HOLLOW] = 1;
        return;
    }
    for (Py_ssize_t i = 0; i < rows->count; i += BATCH) bury_batch(burial, rows, i);
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        const int64_t parent = table->parent[row];
        table->parent[row] = NO_ROW;
        reap_up(burial, parent);
    }
}
