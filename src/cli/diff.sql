-- The number of rows that two versions of a table share, by row key.
select count(*) as shared
from (select distinct row_key from a) a
join (select distinct row_key from b) b on a.row_key = b.row_key
