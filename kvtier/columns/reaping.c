/* Rows of which nothing is left go, and with them the hollow ones before that only they kept. See table.h. */
#include "table.h"

static void bury(Burial *burial, int64_t row) {
    Table *table = burial->table;
    if (table->key[row] && table->key[row] != Py_None && !index_remove(burial->index, table->key[row])) burial->failed = true;
    set_object(&table->key[row], Py_None);
    table->used[row] = table->open[row] = 0;
    if (burial->unused < table->rows) table->free[burial->unused++] = row;
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

void reap(Burial *burial, const Rows *rows) {
    Table *table = burial->table;
    bool parents = false;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        table->children[cell(table, table->parent[row])]--;
        __builtin_prefetch(table->key[row]);
    }
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (!is_empty(table, row)) continue;
        parents |= table->children[row] != 0;
        index_fetch(burial->index, table->key[row]);
    }
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
