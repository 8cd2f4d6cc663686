// Elements of blocks as they lie in a file, as numbers.

KERNEL(256) get_block_rows(GetBlockRows a) {
    begin();
    i64 t = thread_index();
    if (t >= a.n) return;
    i64 at[4];
    coordinates(t, a.ne, at);
    i64 id = *(const i32*)((const char*)a.ids + at[1] * a.ids_nb[0] + at[2] * a.ids_nb[1] + at[3] * a.ids_nb[2]);
    if (id < 0 || id >= a.n_all) return report(a.status, a.node);
    int size = block_elements(a.x_type);
    const u8* x = (const u8*)a.x + at[0] / size * a.x_nb[0] + id * a.x_nb[1] + at[2] * a.x_nb[2] + at[3] * a.x_nb[3];
    *(float*)((char*)a.y + offset(at, a.y_nb)) = block_element(a.x_type, x, (int)(at[0] % size));
}

KERNEL(256) copy_blocks(CopyBlocks a) {
    begin();
    i64 t = thread_index();
    if (t >= a.n) return;
    i64 at[4];
    int size = block_elements(a.x_type);
    coordinates(t, a.x_ne, at);
    int i = (int)(at[0] % size);
    at[0] /= size;
    float v = block_element(a.x_type, (const u8*)a.x + offset(at, a.x_nb), i);
    coordinates(t, a.y_ne, at);
    store_float(a.y_type, (char*)a.y + offset(at, a.y_nb), v);
}
