-- The best answer against the worst: one pair a prompt, with the largest margin there is.
matched as (
    select b.prompt_id, b.candidate as chosen, w.candidate as rejected
    from ranked b
    join ranked w on w.prompt_id = b.prompt_id
    where b.from_best = 1 and w.from_worst = 1
),
