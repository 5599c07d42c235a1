-- The best answer against another one, drawn by seed, prompt and candidate: one pair a prompt, whose
-- rejected answer is what the model usually says.
drawn_first as (
    select o.prompt_id, min(o.drawn) as drawn
    from ranked o
    where o.from_best > 1
    group by o.prompt_id
),
matched as (
    select b.prompt_id, b.candidate as chosen, o.candidate as rejected
    from ranked b
    join drawn_first d on d.prompt_id = b.prompt_id
    join ranked o on o.prompt_id = d.prompt_id and o.drawn = d.drawn
    where b.from_best = 1
),
