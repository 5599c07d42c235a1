-- The number of prompts in both tables of pairs, and of those with different pairs.
select count(*) as prompts,
       count(*) filter (where a.texts <> b.texts) as other
from (select prompt_id, string_agg(chosen || chr(0) || rejected, chr(1) order by chosen, rejected) as texts
      from a group by prompt_id) a
join (select prompt_id, string_agg(chosen || chr(0) || rejected, chr(1) order by chosen, rejected) as texts
      from b group by prompt_id) b on a.prompt_id = b.prompt_id
