/* What pages that come from far away are written with: copies past the caches, since whoever reads a page that waited for a disk does so
   later. */

/* Lines of memory whole, if the target is made of them. `lines_arrive` makes sure that who is told next sees them. */
static void copy_far(char *to, const char *from, size_t count) {
    enum { LINE = 64 };
    if ((uintptr_t)to % LINE || count % LINE) {
        memcpy(to, from, count);
        return;
    }
    for (size_t i = 0; i < count; i += LINE) line_copy_far(to + i, from + i);
}
