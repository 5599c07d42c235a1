-- The best answer against the one next to it: one pair a prompt, the hardest to tell apart.
matched as (
    select b.prompt_id, b.candidate as chosen, s.candidate as rejected
    from ranked b
    join ranked s on s.prompt_id = b.prompt_id
    where b.from_best = 1 and s.from_best = 2
),
