/* ---- the layout ---- */

typedef struct { size_t mem_size; void *mem_buffer; bool no_alloc; } init_params;

uint32_t rp_probe(rp *p, void *(*find)(const char *, void *), void *user) {
    void *(*init)(init_params) = find("ggml_init", user);
    void (*end)(void *) = find("ggml_free", user);
    tensor *(*new_2d)(void *, int, int64_t, int64_t) = find("ggml_new_tensor_2d", user);
    tensor *(*new_3d)(void *, int, int64_t, int64_t, int64_t) = find("ggml_new_tensor_3d", user);
    tensor *(*argsort)(void *, tensor *, int) = find("ggml_argsort", user);
    tensor *(*view_2d)(void *, tensor *, int64_t, int64_t, size_t, size_t) = find("ggml_view_2d", user);
    tensor *(*get_rows)(void *, tensor *, tensor *) = find("ggml_get_rows", user);
    tensor *(*mul_mat_id)(void *, tensor *, tensor *, tensor *) = find("ggml_mul_mat_id", user);
    tensor *(*set_name)(tensor *, const char *) = find("ggml_set_name", user);
    const char *(*get_name)(const tensor *) = find("ggml_get_name", user);
    void *(*get_data)(const tensor *) = find("ggml_get_data", user);
    size_t (*nbytes)(const tensor *) = find("ggml_nbytes", user);
    const char *(*type_name)(int) = find("ggml_type_name", user);
    const char *(*op_desc)(const tensor *) = find("ggml_op_desc", user);
    uint32_t found = RP_SYMBOLS;
    if (init && end && new_2d && new_3d && argsort && view_2d && get_rows && mul_mat_id && set_name && get_name &&
        get_data && nbytes && type_name && op_desc) {
        found = RP_LAYOUT;
        /* Sizes with no common value, so that a field cannot pass for another. */
        enum { E = 24, T = 5, K = 3, IN = 32, OUT = 7 };
        void *ctx = init((init_params){1 << 20, NULL, false});
        tensor *scores = ctx ? new_2d(ctx, TYPE_F32, E, T) : NULL, *order = scores ? argsort(ctx, scores, 1) : NULL;
        tensor *top = order ? view_2d(ctx, order, K, T, E * 4, 8) : NULL;
        tensor *x = top ? new_3d(ctx, TYPE_F32, IN, 1, T) : NULL, *w = x ? new_3d(ctx, TYPE_F32, IN, OUT, E) : NULL;
        tensor *flat = w ? new_3d(ctx, TYPE_F32, 1, E, T) : NULL;
        if (flat) {
            set_name(top, "ffn_moe_topk-3");
            /* The address of the name first: all other offsets that are read lie before it. */
            bool same = (const char *)get_name(top) == top->name && !strcmp(top->name, "ffn_moe_topk-3") &&
                get_data(top) == top->data && get_data(order) == order->data && get_data(scores) == scores->data &&
                scores->data && (char *)top->data == (char *)order->data + 8 && top->view_offs == 8 &&
                top->view_src == order && !order->view_src && order->src[0] == scores && !scores->src[0] &&
                top->ne[0] == K && top->ne[1] == T && top->ne[2] == 1 && top->ne[3] == 1 && top->nb[0] == 4 &&
                top->nb[1] == E * 4 && scores->ne[0] == E && scores->nb[1] == E * 4 && w->ne[2] == E &&
                w->nb[2] == IN * OUT * 4 && nbytes(scores) == E * T * 4 && nbytes(w) == IN * OUT * E * 4 &&
                scores->type == TYPE_F32 && top->type == TYPE_I32 && !strcmp(type_name(TYPE_F32), "f32") &&
                !strcmp(type_name(TYPE_I32), "i32") && !strcmp(op_desc(order), "ARGSORT") && !scores->buffer;
            if (same) {
                tensor *y = mul_mat_id(ctx, w, x, top), *rows = get_rows(ctx, flat, top);
                same = y->src[0] == w && y->src[1] == x && y->src[2] == top && rows->src[0] == flat &&
                    rows->src[1] == top && !strcmp(op_desc(y), "MUL_MAT_ID") && !strcmp(op_desc(rows), "GET_ROWS");
            }
            if (same) found = RP_ON;
        }
        if (ctx) end(ctx);
    }
    if (p && found == RP_ON) p->probed = true;
    else if (p) off(p, found);
    return found;
}
